"""Stateless ops on tensors, each with a plain-torch reference and native backends."""

from plum.ops.code_usage import code_usage
from plum.ops.codebook_sums import codebook_sums
from plum.ops.dead_codes import dead_codes
from plum.ops.residual_quantize import ResidualCodes, residual_quantize
from plum.ops.revive_codes import RevivedCodes, revive_codes

__all__ = [
    "ResidualCodes",
    "RevivedCodes",
    "code_usage",
    "codebook_sums",
    "dead_codes",
    "residual_quantize",
    "revive_codes",
]
