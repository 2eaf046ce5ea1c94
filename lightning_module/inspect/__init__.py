"""The command `triton-gru-inspect`: the gates and the state of a GRU while it reads a text."""
