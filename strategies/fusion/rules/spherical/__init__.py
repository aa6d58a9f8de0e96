"""Rules that interpolate on a sphere: linear combinations whose coefficients depend on angles."""
