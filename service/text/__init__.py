"""Text in and out: tokenizers, chat templates, stop strings, tool calls (API process)."""
