"""How the models of a run are measured and compared: metrics, their statistics, the report."""
