"""Semantic IDs: the table of an item's codes, its quality and its spelling."""

from plum.sid.collisions import resolve_collisions
from plum.sid.quality import quality_report
from plum.sid.table import SidTable
from plum.sid.vocabulary import SidVocabulary

__all__ = ["SidTable", "SidVocabulary", "quality_report", "resolve_collisions"]
