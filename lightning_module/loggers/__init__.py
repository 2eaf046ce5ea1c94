"""What a run logs: metrics.csv, Weights & Biases, MLflow, and where a resumed run goes on."""
