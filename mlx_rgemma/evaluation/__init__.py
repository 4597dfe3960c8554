"""What a model is worth: perplexity, distance from another model, benchmarks of the field."""
