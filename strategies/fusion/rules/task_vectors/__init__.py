"""Rules on task vectors, the differences of models from the anchor that they were fine-tuned from."""
