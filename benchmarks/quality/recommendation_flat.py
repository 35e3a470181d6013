"""What ``plum finetune`` trains on flat SIDs, in the recommendation experiments: GPT-2 or T5."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.recommendation_inputs import BEAMS, KS, TEST_SECONDS, Inputs

if TYPE_CHECKING:
    from plum.lm import Generator


class _TimeIsUp(Exception):
    pass


def run_flat(job: Any, inputs: Inputs, seconds: float | None) -> dict[str, Any]:
    """Trains and tests one model; the best weights by validation loss count."""
    import torch

    from plum.lm import FinetuneConfig, finetune, load_generator
    from plum.lm.checkpoints import Checkpoints
    from plum.sid import SidVocabulary

    start = time.monotonic()
    limit = None if seconds is None else max(1.0, seconds - 3 * TEST_SECONDS)
    codes, sizes = inputs.sids[job.sids]
    config = {name: value for name, value in job.config.items() if name != "base"}
    items = config["max_items"]
    vocabulary = SidVocabulary(sizes)
    generator = load_generator(
        job.config["base"], vocabulary, seed=job.seed, max_length=1 + len(sizes) * (items + 1)
    )
    rows = [np.append(*row) for row in zip(*inputs.split("validation"), strict=True)]
    done = {"steps": 0}

    def watch(step: int, total: int) -> None:
        done.update(steps=step, total=total)
        if limit is not None and time.monotonic() - start > limit:
            raise _TimeIsUp

    with tempfile.TemporaryDirectory() as folder:
        options = FinetuneConfig(seed=job.seed, save_every_steps=10**9, **config)
        try:
            finetune(generator, inputs.training(), rows, codes, folder, options, progress=watch)
        except _TimeIsUp:
            if (Path(folder) / "checkpoints" / "best.safetensors").exists():
                Checkpoints(Path(folder) / "checkpoints", "").load_best(generator.model)
    trained = time.monotonic() - start
    return {
        **score_flat(generator, codes, items, inputs),
        "parameters": sum(p.numel() for p in generator.model.parameters()),
        "steps": done["steps"],
        "stopped_by_time": done["steps"] < done["total"],
        "train_seconds": round(trained, 1),
        "test_seconds": round(time.monotonic() - start - trained, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def score_flat(
    generator: Generator, codes: np.ndarray, items: int, inputs: Inputs
) -> dict[str, Any]:
    """Tests a model: full ranking by constrained beams, and its SID tokens level by level."""
    import torch

    from plum.decode import SidBeamSearch
    from plum.eval import expand_sids, ranking_metrics
    from plum.lm import validate
    from plum.trie import SidTrie

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = generator.model
    model.to(device).eval()
    form = generator.format(codes, items)
    sizes, offsets = generator.codebook_sizes, generator.token_offsets
    trie = SidTrie.from_codes(codes, codebook_sizes=sizes, token_offsets=offsets)
    search = SidBeamSearch(model, trie)
    histories, targets = inputs.split("test")
    every = np.array(trie.items(trie.root_states(1))[0][0])
    order = np.argsort([len(history) for history in histories], kind="stable")
    scored = {}
    for name, unseen in (("metrics", False), ("metrics_unseen", True)):
        ranked = np.full((len(targets), max(KS)), -1, dtype=np.int32)
        for low in range(0, len(order), 256):
            part = order[low : low + 256]
            tokens, mask = form.pad_prompts([histories[row] for row in part])
            deny = [np.unique(histories[row]).tolist() for row in part] if unseen else None
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = search.search(
                    tokens.to(device), mask.to(device), num_beams=BEAMS, deny=deny
                )
            states = found.states[..., 0].masked_fill(found.scores.isneginf(), -1)
            ranked[part], _ = expand_sids(
                states.cpu().numpy(),
                found.scores.cpu().numpy(),
                trie.item_starts,
                every,
                k=max(KS),
                seed=0,
                requests=part,
            )
        scored[name] = ranking_metrics(ranked, targets, ks=KS, num_items=inputs.num_items)
    tests = [np.append(*row) for row in zip(histories, targets, strict=True)]
    levels = validate(model, form, tests, batch_size=256)
    return {
        **scored,
        "beams": BEAMS,
        "level_accuracy": levels["level_accuracy"],
        "level_perplexity": levels["level_perplexity"],
    }
