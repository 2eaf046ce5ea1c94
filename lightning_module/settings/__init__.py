"""Settings as users type them: read, checked against a table, refused with a reason."""
