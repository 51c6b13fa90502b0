"""Two templates, two tokenizers, one text. No MLX in here."""
