"""Diagnostics: measure how far apart models are, by loss barriers and other numbers."""
