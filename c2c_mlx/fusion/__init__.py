"""C2C itself: caches and token ids in, a fused mlx-lm prompt cache out."""
