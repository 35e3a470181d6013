"""The generator: a causal language model over SID tokens, its input format and its training."""

from plum.lm.corpus import ItemTexts
from plum.lm.depth import DepthGenerator, is_depth_generator
from plum.lm.depth_training import depth_shape, finetune_depth, is_depth_base
from plum.lm.examples import SidFormat, TrainingBatches
from plum.lm.finetuning import FinetuneConfig, finetune
from plum.lm.model import Generator, load_generator
from plum.lm.pretraining import PretrainConfig, pretrain
from plum.lm.sasrec import SASRec
from plum.lm.timeline import TimelineConfig, TimelineShape, train_timeline
from plum.lm.training import TrainingConfig
from plum.lm.validation import validate

__all__ = [
    "DepthGenerator",
    "FinetuneConfig",
    "Generator",
    "ItemTexts",
    "PretrainConfig",
    "SASRec",
    "SidFormat",
    "TimelineConfig",
    "TimelineShape",
    "TrainingBatches",
    "TrainingConfig",
    "depth_shape",
    "finetune",
    "finetune_depth",
    "is_depth_base",
    "is_depth_generator",
    "load_generator",
    "pretrain",
    "train_timeline",
    "validate",
]
