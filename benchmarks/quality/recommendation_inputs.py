"""What the recommendation experiments read: sequences and SIDs, made once, without a GPU.

A file ``<catalog>.safetensors`` holds ``items`` int32 ``[T]`` and ``offsets`` int64 ``[U + 1]``,
all users end to end in time order, and for each kind of SIDs ``codes.<kind>`` int32 ``[N, L]`` and
``sizes.<kind>`` int64 ``[L]``. Every item has a SID of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from plum.files import atomic_path

KS = (1, 5, 10, 20, 50)
BEAMS = 50
# What a job needs after training: the best weights are put in place and scored on the test set.
TEST_SECONDS = 15.0
# What each kind of SIDs is made of, and its codebook sizes; None stands for resolutions that begin
# with the largest power of two up to a third of the items.
KINDS: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]] = {
    "text": (("text",), (256, 256, 256)),
    "behavior": (("behavior",), (256, 256, 256)),
    "fused": (("text", "behavior"), (256, 256, 256)),
    "fused, 2 levels": (("text", "behavior"), (512, 256)),
    "fused, multi-resolution": (("text", "behavior"), None),
}


@dataclass(frozen=True)
class Inputs:
    """A catalog's sequences, split, and its SIDs by kind."""

    items: np.ndarray
    offsets: np.ndarray
    sids: dict[str, tuple[np.ndarray, tuple[int, ...]]]
    num_items: int

    def split(self, name: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Histories and targets of "validation" or "test", leave-one-out, one row per user."""
        ends = self.offsets[1:] - (1 if name == "test" else 2)
        histories = [self.items[a:b] for a, b in zip(self.offsets, ends, strict=False)]
        return histories, self.items[ends]

    def training(self) -> list[np.ndarray]:
        """Everything but the last two items of each user."""
        return self.split("validation")[0]


def load_inputs(path: Path) -> Inputs:
    tensors = load_file(path)
    sids = {
        name.removeprefix("codes."): (codes, tuple(tensors[f"sizes{name[5:]}"].tolist()))
        for name, codes in tensors.items()
        if name.startswith("codes.")
    }
    num_items = len(next(iter(sids.values()))[0])
    return Inputs(tensors["items"], tensors["offsets"], sids, num_items)


def prepare(data: Path, output: Path, cache: Path) -> None:
    """Writes the inputs of ML-1M (5-core, as SASRec) and Beauty (5-core, as TIGER and P5)."""
    from benchmarks.quality.codebook_catalogs import ENCODER, beauty, movielens_1m
    from plum.data import behavior_vectors, filter_interactions, sequences_of
    from plum.embed import encode_texts
    from plum.quantize import multi_resolution_sizes

    every = movielens_1m(data)
    movies = filter_interactions(every, min_user_interactions=5, min_item_interactions=5)
    for name, dataset in (("ml-1m", movies), ("beauty", beauty(data))):
        sequences = sequences_of(dataset)
        assert np.diff(sequences.offsets).min() >= 5, name
        text = encode_texts(dataset.texts(), encoder=ENCODER, cache_dir=cache / "embeddings")
        behavior, _ = behavior_vectors(sequences, window=10)
        tensors = {"items": sequences.items, "offsets": sequences.offsets}
        vectors = {"text": torch.from_numpy(text), "behavior": torch.from_numpy(behavior)}
        for kind, (names, levels) in KINDS.items():
            if levels is None:
                levels = multi_resolution_sizes(1 << (len(text) // 3).bit_length() - 1, 3)
            codes, sizes = unique_sids({each: vectors[each] for each in names}, levels)
            tensors |= {f"codes.{kind}": codes, f"sizes.{kind}": np.array(sizes)}
            used = [len(np.unique(column)) for column in codes.T]
            print(f"{name}: {kind} SIDs of {len(codes)} items use {used} codes", flush=True)
        with atomic_path(output / f"{name}.safetensors") as path:
            save_file(tensors, path)


def unique_sids(
    vectors: dict[str, torch.Tensor], sizes: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """RQ-KMeans SIDs of which no two items share one, int32 ``[N, L]``."""
    from plum.pipeline.tokenize_file import before_last
    from plum.quantize import fit_tokenizer
    from plum.sid import resolve_collisions

    model = fit_tokenizer(vectors, "rq-kmeans", codebook_sizes=sizes)
    latents = model.latents(vectors)
    found = model.quantizer.encode(latents).numpy()
    codes, sizes = resolve_collisions(
        found,
        sizes,
        "balanced",
        residuals=before_last(model, latents, found),
        codebook=model.quantizer.codebooks[-1].detach(),
    )
    assert len(np.unique(codes, axis=0)) == len(codes)
    return codes, sizes
