"""Tasks over long texts."""
