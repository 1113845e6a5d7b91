"""The muscle: all device work. Knows nothing of HTTP, names or files other than weights."""
