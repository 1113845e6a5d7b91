"""All device work, in the worker process. Knows nothing of HTTP, names or files other than weights."""
