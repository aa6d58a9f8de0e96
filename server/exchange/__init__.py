"""One exchange with the clients: requests out, replies in, each checked and added or refused by name."""
