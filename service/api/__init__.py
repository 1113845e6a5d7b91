"""The HTTP API: JSON and server-sent events. API process; must not know tensors."""
