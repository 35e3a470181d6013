"""Embeddings of item texts and images, and how similar they are to each other."""

from __future__ import annotations

from plum.embed.image_features import colors_and_textures
from plum.embed.images import ImageFiles, encode_images
from plum.embed.models import find_encoder
from plum.embed.similarity import plot_similarity, similarity_report
from plum.embed.texts import encode_texts

__all__ = [
    "ImageFiles",
    "colors_and_textures",
    "encode_images",
    "encode_texts",
    "find_encoder",
    "plot_similarity",
    "similarity_report",
]
