"""Operations on model states: names, interpolation, long tensors, batches of examples."""
