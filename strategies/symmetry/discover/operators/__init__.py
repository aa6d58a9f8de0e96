"""Rules of operators: how the features of their operands become the features of their result."""
