"""Merges that are chosen by a score: candidates, soups, and coefficients by layer."""
