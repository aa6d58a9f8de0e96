"""Statistics of a model on data: Gram matrices, Fisher information, Kronecker factors."""
