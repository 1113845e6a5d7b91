"""Frozen nouns that both ends of a pipe share; imports nothing of ours but errors."""
