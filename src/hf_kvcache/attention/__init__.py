"""Attention over views: what transformers calls, and how the stored bytes are read."""
