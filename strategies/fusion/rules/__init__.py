"""Rules by which models become one, tensor by tensor."""
