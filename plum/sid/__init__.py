"""Semantic IDs: the table of an item's codes, its quality and its spelling."""

from plum.sid.collisions import resolve_collisions
from plum.sid.interchange import read_sids, write_sids
from plum.sid.quality import quality_report
from plum.sid.table import SidTable
from plum.sid.vocabulary import SidVocabulary

__all__ = [
    "SidTable",
    "SidVocabulary",
    "quality_report",
    "read_sids",
    "resolve_collisions",
    "write_sids",
]
