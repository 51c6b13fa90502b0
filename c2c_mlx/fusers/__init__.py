"""A fuser's files: ours, the world's, and where to find them by name."""
