"""Smaller checkpoints: which experts to keep, merge or store in fewer bits."""

from coterie.shrink.importance import IMPORTANCE, importance, kept_experts, mixed, overlap

__all__ = ["IMPORTANCE", "importance", "kept_experts", "mixed", "overlap"]
