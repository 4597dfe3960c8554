"""The model state of one text: save, load, fork, rewind, prompt caches."""
