"""Hooks that record what a model computes while it runs."""
