"""Fusion of low-rank adapters: factors, products and their low-rank sums."""
