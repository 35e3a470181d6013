"""Evaluation: ranking metrics under leave-one-out and the baselines to hold them against."""

from plum.eval.baselines import ItemKNN, Popularity
from plum.eval.metrics import expand_sids, ranking_metrics

__all__ = ["ItemKNN", "Popularity", "expand_sids", "ranking_metrics"]
