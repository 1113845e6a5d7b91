"""Request bodies, a file for each dialect."""
