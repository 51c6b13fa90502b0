"""The terminal app; `run.run` opens it."""
