"""The terminal: signals, standard streams, progress bars."""
