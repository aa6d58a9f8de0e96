"""Symmetries of published transformer architectures, read from a model's config and parameter names."""
