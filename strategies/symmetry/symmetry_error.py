"""The error of symmetries, their groups, folds and shifts."""


class SymmetryError(ValueError):
    """A symmetry that is not in the notation, or that does not fit a model or its tensors."""
