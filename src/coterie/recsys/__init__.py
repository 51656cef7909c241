"""Rankers: several behaviours at once, and one user's history at a time."""
