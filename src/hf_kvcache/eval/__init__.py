"""Fidelity and task scores of a model behind a cache."""
