"""Exact preference games: the same losses, where the distance to the Nash policy is a number."""
