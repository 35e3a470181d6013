"""Does a pretrained language model help, and does continued pre-training? PLUM's four cells.

Usage: python -m benchmarks.quality.llm_init_cpt --data DIR --inputs DIR --base FOLDER

Each cell begins with a pretrained base or with the same shape, its weights drawn anew; with
continued pre-training on behavior and item texts or without; and ends with the same fine-tuning.
The inputs are those of ``benchmarks.quality.recommendation prepare``. A cell whose result is there
is not repeated, and one that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import results
from benchmarks.quality.recommendation_flat import score_flat
from benchmarks.quality.recommendation_inputs import Inputs, load_inputs
from plum.files import read_json, write_text

NAME = "llm_init_cpt"
DATASET, SIDS = "ml-1m", "fused"
# What each item is told with, and what stands after it in a history.
COLUMNS, ATTRIBUTE = ("title", "year", "genres"), "year"
CELLS = [(init, cpt) for init in ("random", "pretrained") for cpt in (False, True)]
# PLUM's table for a mixture of experts with 900M activated parameters: Recall@10 of day 8.
PUBLISHED = {
    ("random", False): 0.19,
    ("pretrained", False): 0.23,
    ("random", True): 0.27,
    ("pretrained", True): 0.28,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "pretrain": {
            "steps": 250,
            "batch_size": 16,
            "sequence_length": 256,
            "max_items": 10,
            "learning_rate": 2e-3,
            "eval_every_steps": 125,
            "bf16": False,
        },
        "finetune": {
            "max_steps": 250,
            "batch_size": 128,
            "max_items": 10,
            "learning_rate": 2e-3,
            "eval_every_steps": 125,
            "bf16": False,
        },
    },
    "gpu": {
        "pretrain": {"steps": 5000, "batch_size": 64, "max_items": 20, "learning_rate": 5e-4},
        "finetune": {
            "max_steps": 5000,
            "batch_size": 256,
            "max_items": 50,
            "learning_rate": 5e-4,
            "eval_every_steps": 500,
        },
    },
    "smoke": {
        "pretrain": {"steps": 3, "batch_size": 2, "sequence_length": 64, "max_items": 4},
        "finetune": {"max_steps": 3, "batch_size": 4, "max_items": 4},
    },
}


def item_texts(data: Path) -> Any:
    """What is said of the movies of the prepared inputs."""
    from benchmarks.quality.codebook_catalogs import movielens_1m
    from plum.data import filter_interactions
    from plum.lm import ItemTexts

    every = movielens_1m(data)
    dataset = filter_interactions(every, min_user_interactions=5, min_item_interactions=5)
    columns = {name: dataset.items[name].to_list() for name in COLUMNS}
    return ItemTexts(dataset.texts(), columns, [value or "" for value in columns[ATTRIBUTE]])


def redrawn(base: str, folder: Path, seed: int) -> str:
    """Saves a model of the shape and with the tokenizer of a base, its weights drawn anew."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def written_by(base: str, seed: int, *, texts: int = 64, tokens: int = 200) -> str:
    """Texts that a base writes by itself, drawn from its own distribution."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    torch.manual_seed(seed)
    prompts = torch.full((texts, 1), first)
    drawn = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens,
        pad_token_id=first,
    )
    found = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    # An empty line would end a document.
    return "\n\n".join("\n".join(filter(None, text.split("\n"))) for text in found)


def run_cell(
    init: str, cpt: bool, options: argparse.Namespace, inputs: Inputs, items: Any, text: str
) -> dict[str, Any]:
    """Trains and tests one cell."""
    from plum.lm import FinetuneConfig, PretrainConfig, finetune, load_generator, pretrain
    from plum.lm.corpus import general_documents, tokenize
    from plum.lm.pretraining import held_out_losses
    from plum.sid import SidVocabulary

    codes, sizes = inputs.sids[SIDS]
    vocabulary, preset, seed = SidVocabulary(sizes), PRESETS[options.preset], options.seed
    folder = options.work / f"{options.name}-{options.preset}-{seed}"
    start = options.base
    if init == "random":
        start = redrawn(options.base, folder / "redrawn", seed)
    base = load_generator(start, vocabulary, seed=seed)
    validation = [np.append(*row) for row in zip(*inputs.split("validation"), strict=True)]
    length = PretrainConfig(**preset["pretrain"]).sequence_length

    def general_loss(generator: Any) -> float:
        documents = tokenize(general_documents(text), generator.tokenizer, length, targets=True)
        found = held_out_losses(generator, documents, length, batch_size=16)
        return found["losses"]["general"]

    def progress(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            print(f"{init}, CPT {cpt}: {done}/{total}", flush=True)

    result: dict[str, Any] = {"general_loss": {"start": general_loss(base)}, "seconds": {}}
    cell = folder / f"{init}-{'cpt' if cpt else 'none'}"
    if cpt:
        began = time.monotonic()
        config = PretrainConfig(seed=seed, **preset["pretrain"])
        history = pretrain(
            base, inputs.training(), validation, codes, items, cell / "pretrain", config,
            general_text=text, progress=progress,
        )  # fmt: skip
        start = str(cell / "pretrain" / "model")
        result["seconds"]["pretrain"] = round(time.monotonic() - began, 1)
        result["pretrain"] = history
        result["general_loss"]["pretrained"] = history[-1]["losses"]["general"]
        base = load_generator(start, vocabulary, seed=seed)
    began = time.monotonic()
    config = FinetuneConfig(seed=seed, **preset["finetune"])
    history = finetune(
        base, inputs.training(), validation, codes, cell / "finetune", config, progress=progress
    )
    result["seconds"]["finetune"] = round(time.monotonic() - began, 1)
    result["finetune"] = history
    result["validation_loss"] = min(record["validation_loss"] for record in history)
    result["general_loss"]["finetuned"] = general_loss(base)
    began = time.monotonic()
    result |= score_flat(base, codes, config.max_items, inputs)
    result["seconds"]["test"] = round(time.monotonic() - began, 1)
    result["parameters"] = sum(p.numel() for p in base.model.parameters())
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the cells that have no result yet."""
    import torch

    path = results.RESULTS / f"{NAME}.json"
    result = read_json(path) if path.exists() else {"runs": []}
    result.pop("versions", None)
    inputs = load_inputs(options.inputs / f"{DATASET}.safetensors")
    text_file = options.work / f"{options.name}-{options.seed}.txt"
    if options.text is None and not text_file.exists():
        write_text(text_file, written_by(options.base, options.seed))
    text = (options.text or text_file).read_text(encoding="utf-8")
    items = item_texts(options.data)
    for init, cpt in CELLS:
        cell = {"base": options.name, "preset": options.preset, "seed": options.seed}
        cell |= {"init": init, "cpt": cpt}
        if any(cell.items() <= done.items() for done in result["runs"]):
            continue
        found = run_cell(init, cpt, options, inputs, items, text)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        settings = PRESETS[options.preset]
        facts = {"settings": settings, "threads": torch.get_num_threads(), "device": device}
        facts |= {"general_text": "given" if options.text else "written by the base"}
        result["runs"] = [*results.runs_in(path), cell | facts | found]
        results.save_result(NAME, result)
        print(init, cpt, {k: round(found["metrics"][k], 4) for k in ("recall@10", "ndcg@10")})
    return result


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md."""
    header = ["start", "CPT", "PLUM R@10", "R@10", "N@10", "R@10 unseen", "validation loss"]
    header += ["accuracy by level", "perplexity by level", "general text", "seconds"]
    rows = []
    for run in sorted(result["runs"], key=lambda r: (r["base"], r["preset"], r["seed"])):
        plum = PUBLISHED[run["init"], run["cpt"]]
        general = run["general_loss"]
        cells = [f"{run['base']}, {run['init']}", "yes" if run["cpt"] else "no", f"{plum:.2f}"]
        cells += [f"{run['metrics'][name]:.4f}" for name in ("recall@10", "ndcg@10")]
        cells += [f"{run['metrics_unseen']['recall@10']:.4f}", f"{run['validation_loss']:.3f}"]
        cells.append(" / ".join(f"{value:.3f}" for value in run["level_accuracy"]))
        cells.append(" / ".join(f"{value:.1f}" for value in run["level_perplexity"]))
        steps = ("start", "pretrained", "finetuned")
        cells.append(" → ".join(f"{general[step]:.2f}" for step in steps if step in general))
        cells.append(f"{sum(run['seconds'].values()):.0f}")
        rows.append(cells)
    lines = [_HEAD, *results.table(header, rows, words=2), ""]
    if len(result["runs"]) % len(CELLS):
        lines += ["Cells that are not in the table have not been run.", ""]
    lines += results.filled(_READING)
    told = [run for run in result["runs"] if run["cpt"]]
    if not told:
        return "\n".join(lines)
    header = ["start", "after step", "behavior", "text → SID", "SID → text"]
    header += ["behavior by level", "text → SID by level"]
    rows = []
    for run in told:
        for record in run["pretrain"]:
            losses, levels = record["losses"], record["level_losses"]
            cells = [f"{run['base']}, {run['init']}", str(record["step"])]
            tasks = ("behavior", "text_to_sid", "sid_to_text")
            cells += [f"{losses[task]:.3f}" for task in tasks]
            cells += [" / ".join(f"{v:.2f}" for v in levels[task]) for task in tasks[:2]]
            rows.append(cells)
    return "\n".join([*lines, *results.table(header, rows, words=1), ""])


_HEAD = f"""## Pretrained base and continued pre-training

`python -m benchmarks.quality.{NAME} --data DIR --inputs DIR --base FOLDER --name NAME`
"""
_READING = """
ML-1M as under *Recommendation quality*, SIDs of text and log (256 x 256 x 256), histories of 10
items, 50 beams, every test user, full ranking; one seed. *Random* has the shape and the tokenizer
of the base and weights drawn anew. Every cell has the same number of fine-tuning steps, and those
with CPT have the pre-training on top, as in PLUM's table, which is that of a model of 900M
activated parameters on YouTube's log: what can be compared is the order of the cells. So what CPT
adds includes that of the steps it adds. Seconds are those of a machine that was shared.

Losses are in nats per token: *validation* on the SID of the validation item after fine-tuning,
*general text* at the start, after CPT where there is one, and after fine-tuning; that text was
written by the base itself, sampled at temperature 1, so its loss at the start is the base's own
entropy. Below, held-out losses during CPT: the next item of a history, and SIDs and texts of items
none of whose texts were trained on. Their genres stood behind their SIDs in the histories, which
newer code leaves out, so that the losses of SID → text are lower than they would be now.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--inputs", type=Path, default=Path("runs/quality-inputs"))
    parser.add_argument("--base", required=True, help="folder or hub name of a language model")
    parser.add_argument("--name", help="what the base is called in the results")
    parser.add_argument("--text", type=Path, help="general text; default: written by the base")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/llm-init-cpt"))
    options = parser.parse_args()
    options.name = options.name or Path(options.base).name
    run(options)


if __name__ == "__main__":
    main()
