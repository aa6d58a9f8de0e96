"""Alignment: find the transform that takes a client's model into the anchor's basin."""
