"""The engines: ways to compute the states of a layer from its tensors."""
