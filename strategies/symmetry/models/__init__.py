"""Symmetries of published architectures, derived from configuration and parameter names."""
