"""One round of federated learning: its stages, what each asks of the clients, and how replies are checked."""
