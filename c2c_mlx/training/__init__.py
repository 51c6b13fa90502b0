"""Training a fuser: both models frozen, next-token loss, nothing else (paper, section 3.3)."""
