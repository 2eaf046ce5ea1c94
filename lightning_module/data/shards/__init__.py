"""Corpora in shards at a URL."""
