"""Programs that use the service as its users do; each stands by itself."""
