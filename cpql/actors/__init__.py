"""Actors, one file a kind."""
