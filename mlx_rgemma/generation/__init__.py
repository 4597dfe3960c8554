"""Text generation: single prompts, batches, speculative decoding."""
