"""Models in files: read, inspected, aligned, checked and written back, without a run."""
