"""The stages of the pipeline, in order; each reads and writes the files that docs/design.md lists."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from plum.data import Dataset, filter_interactions, load_dataset, sequences_of
from plum.embed import encode_texts, item_texts, similarity_report
from plum.errors import InvalidData
from plum.eval import ItemKNN, Popularity, ranking_metrics
from plum.files import atomic_path, read_json, write_json
from plum.lm import FinetuneConfig, finetune, load_generator
from plum.pipeline.recommender import Recommender
from plum.pipeline.stage import Stage, Workspace
from plum.quantize import fit_tokenizer, load_tokenizer
from plum.sid import SidTable, SidVocabulary, quality_report, resolve_collisions
from plum.trie import SidTrie
