"""What every dialect does between a parsed body and its answer."""
