"""Where adapters come from: folders, uploads, the hub."""
