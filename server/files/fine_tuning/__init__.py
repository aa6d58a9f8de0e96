"""Fine-tunings of stored models: carried to another base, and extracted as adapters."""
