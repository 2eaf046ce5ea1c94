"""The page of `triton-gru-predict --serve`."""
