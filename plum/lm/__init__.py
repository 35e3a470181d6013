"""The generator: a causal language model over SID tokens, its input format and its training."""

from plum.lm.depth import DepthGenerator
from plum.lm.examples import SidFormat, TrainingBatches
from plum.lm.model import Generator, load_generator
from plum.lm.sasrec import SASRec
from plum.lm.timeline import TimelineConfig, TimelineShape, train_timeline
from plum.lm.training import FinetuneConfig, finetune
from plum.lm.validation import validate

__all__ = [
    "DepthGenerator",
    "FinetuneConfig",
    "Generator",
    "SASRec",
    "SidFormat",
    "TimelineConfig",
    "TimelineShape",
    "TrainingBatches",
    "finetune",
    "load_generator",
    "train_timeline",
    "validate",
]
