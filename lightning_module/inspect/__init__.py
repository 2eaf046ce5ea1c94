"""The command `triton-gru-inspect`: the gates and the memory of a GRU while it reads a text."""
