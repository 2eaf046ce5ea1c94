"""Settings as users type them: reading, and checks against a table."""
