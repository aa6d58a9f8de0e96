"""Clients that fail as they are told."""
