"""The logs of a run: metrics.csv, Weights & Biases, MLflow, and their resumption."""
