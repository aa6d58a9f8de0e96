"""Distillation of several models into one, on inputs without labels."""
