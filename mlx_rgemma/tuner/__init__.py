"""Training: from scratch, further, and by adapters."""
