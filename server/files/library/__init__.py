"""Stored models as modules: the architecture that a config names, its inputs, and where its tensors are stored."""
