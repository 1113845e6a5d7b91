"""The text border: tokenizers, templates, stop strings, tool calls."""
