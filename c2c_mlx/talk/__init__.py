"""A conversation in four modes, and the one thread that holds it."""
