"""The Triton kernels of the recurrence, and the engine that launches them."""
