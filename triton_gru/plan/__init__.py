"""How the kernels are launched for a shape on a device. Pure Python but for `selection`."""
