"""Stored models on data that a user gives: losses, paths between models, statistics."""
