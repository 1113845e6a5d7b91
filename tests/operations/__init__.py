"""The service where a host is not as it should be: disks, folders, users."""
