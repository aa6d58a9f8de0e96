"""Statistics that a client collects on its data: Gram matrices, Fisher information, Kronecker factors."""
