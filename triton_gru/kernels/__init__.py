"""The Triton kernels of the recurrence, and what launches them."""
