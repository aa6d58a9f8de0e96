"""Diagnostics that a client computes on its own data: losses along paths, variances, singular vectors."""
