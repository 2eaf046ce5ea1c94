"""The command `triton-gru-memory`: how far back GRU, LSTM and RNN remember."""
