"""The server: mlx-lm's, with the checks and the memory bounds that it leaves open."""
