"""Train and sample sentence prediction models with Lightning and Hydra."""
