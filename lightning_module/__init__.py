"""Train and sample sentence prediction models with Lightning and Hydra."""

from lightning_module.use_triton_gru import UseTritonGRU

__all__ = ["UseTritonGRU"]
