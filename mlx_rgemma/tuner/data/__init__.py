"""Training data: datasets, packing, batches."""
