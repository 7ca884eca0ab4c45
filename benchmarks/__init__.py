"""Measurements of time and memory; NOTES.md holds what was found."""
