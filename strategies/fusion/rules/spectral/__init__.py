"""Rules on the singular values and input subspaces of a matrix's task vectors."""
