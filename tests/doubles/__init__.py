"""The stand-ins for what the API needs of other rooms: one for the engine, one for the registry."""
