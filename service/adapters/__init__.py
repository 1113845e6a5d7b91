"""The shelf: what adapters are, where their files lie, which names they have. Knows no live model."""
