"""One folder per Kubeflow component: interface, README.md, metadata.yaml. No training logic lives here."""
