"""Stateless ops on tensors, each with a plain-torch reference and native backends."""

from plum.ops.code_usage import code_usage
from plum.ops.codebook_sums import codebook_sums
from plum.ops.dead_codes import dead_codes
from plum.ops.fill_reservoir import (
    Reservoir,
    empty_reservoir,
    fill_reservoir_,
    reservoir_sizes,
)
from plum.ops.forced_tail import ForcedTail, forced_tail
from plum.ops.residual_quantize import ResidualCodes, residual_quantize
from plum.ops.revive_codes import RevivedCodes, revive_codes
from plum.ops.trie_advance import trie_advance
from plum.ops.trie_beam_sample import SampleStep, trie_beam_sample
from plum.ops.trie_beam_step import BeamStep, trie_beam_step
from plum.ops.trie_deny import trie_deny
from plum.ops.trie_mask import trie_mask, trie_mask_
from plum.ops.trie_walk import trie_walk

__all__ = [
    "BeamStep",
    "ForcedTail",
    "Reservoir",
    "ResidualCodes",
    "RevivedCodes",
    "SampleStep",
    "code_usage",
    "codebook_sums",
    "dead_codes",
    "empty_reservoir",
    "fill_reservoir_",
    "forced_tail",
    "reservoir_sizes",
    "residual_quantize",
    "revive_codes",
    "trie_advance",
    "trie_beam_sample",
    "trie_beam_step",
    "trie_deny",
    "trie_mask",
    "trie_mask_",
    "trie_walk",
]
