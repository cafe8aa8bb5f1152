"""Recommendation data. Imports neither torch nor transformers."""
