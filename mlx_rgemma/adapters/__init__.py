"""LoRA adapters: configuration, files, insertion and gates."""
