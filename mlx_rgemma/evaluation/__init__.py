"""Evaluation: perplexity, distance from another model, the lm-evaluation-harness."""
