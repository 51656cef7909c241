"""The bridge to Hugging Face transformers. Importing it registers the `coterie` experts implementation."""

from coterie.hf.experts import experts_forward, register

__all__ = ["experts_forward", "register"]

register()
