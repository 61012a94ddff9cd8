"""Training scripts, one per thing that can be trained."""
