"""Tasks: what a model's outputs mean, so that losses, Fisher information and heads follow from one value."""
