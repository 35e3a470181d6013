"""Embeddings of item texts, and how similar they are to each other."""

from __future__ import annotations

from plum.embed.encoder import encode_texts, find_encoder
from plum.embed.similarity import similarity_report

__all__ = ["encode_texts", "find_encoder", "similarity_report"]
