"""The generator: a causal language model over SID tokens, its input format and its training."""

from plum.lm.examples import SidFormat, TrainingBatches
from plum.lm.model import Generator, load_generator
from plum.lm.training import FinetuneConfig, finetune
from plum.lm.validation import validate

__all__ = [
    "FinetuneConfig",
    "Generator",
    "SidFormat",
    "TrainingBatches",
    "finetune",
    "load_generator",
    "validate",
]
