"""The terminal app; `app.run` opens it."""
