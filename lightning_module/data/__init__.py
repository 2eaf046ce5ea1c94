"""Text to chunks of tokens: corpora, tokenizers, the cache of tokens, the data module."""
