"""Compressed forms of Gram matrices and cross-moments, and the byte budget that selects them."""
