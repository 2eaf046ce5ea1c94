"""The Triton kernels of the recurrence and their host launchers."""
