"""What computes a layer: the ways from a layer's tensors to its states."""
