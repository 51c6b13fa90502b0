"""The terminal app; not there yet."""
