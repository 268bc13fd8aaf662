"""Pretraining of the embedded model from nothing: vision and language together, on all tasks."""
