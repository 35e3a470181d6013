"""plum: generative recommendation on Semantic IDs."""

__version__ = "0.1.0"
