"""Sources of adapters, in the API process: folders, uploads, the hub."""
