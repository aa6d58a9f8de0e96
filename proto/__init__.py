"""The wire: messages, generated code, and the codec of tensors."""
