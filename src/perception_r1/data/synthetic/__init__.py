"""Synthetic data: images drawn here, with exact annotations, deterministic by seed."""
