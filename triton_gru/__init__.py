"""The GRU recurrence as fused Triton kernels, behind the surface of `torch.nn.GRU`."""
