"""Which cache: what single layers lose by compression, and what to do with a budget of bytes."""
