"""The door: HTTP, JSON, server-sent events. Knows no tensors."""
