"""Tokenizers: loading, checks, chunked encoding, streaming detokenization."""
