"""Somebody else's loop: recorded, solved and replayed, unmodified."""
