"""A run on the server: settings, the round loop, checkpoints and the streaming grid."""
