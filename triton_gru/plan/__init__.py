"""Plans: how the kernels are launched for a shape on a device. No torch but in `selection`."""
