"""The endpoint: what clients ask, in their dialect, answered many at once by one thread."""
