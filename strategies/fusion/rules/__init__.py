"""Merging rules: functions of one tensor of each model, `(anchor, tensors, weights, **parameters) -> tensor`."""
