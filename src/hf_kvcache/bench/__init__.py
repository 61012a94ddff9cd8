"""Timing and memory, measured so that the numbers can be trusted."""
