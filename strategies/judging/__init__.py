"""Judgement of replies and models: checks of an update, bounds on a client's influence, strikes and outcomes."""
