"""The image a component runs in unless the pipeline names another one (recipe: `resources.image`)."""

IMAGE = "dqo-trainer:0.1.0"
