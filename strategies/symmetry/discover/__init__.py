"""Discovery of a model's symmetry from its traced or exported forward pass."""
