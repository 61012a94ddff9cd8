"""Repositories that bring their own code: models whose cache is ours, for people who do not have this library."""
