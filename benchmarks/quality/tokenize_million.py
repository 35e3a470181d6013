"""A million embeddings to a SID table: rate, memory, and what being killed costs.

Usage: python -m benchmarks.quality.tokenize_million [--items N] [--work DIR]

Synthetic rows of 384 numbers in a Parquet file, an RQ-VAE of 3 x 256 codes that is fitted already,
one process of as many threads as OMP_NUM_THREADS and POLARS_MAX_THREADS say. The work is done twice
by ``plum.pipeline.tokenize_file.tokenize_parquet``: once in one go, and once killed half way and
started again, which must end with the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.quality.results import filled, save_result, table
from plum.pipeline.embedding_file import ROWS_PER_CHUNK, EmbeddingFile
from plum.quantize import RQVAE, fit_tokenizer
from plum.sid import SidTable

NAME = "tokenize_million"
WIDTH, SIZES = 384, (256, 256, 256)
CHILD = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
from plum.pipeline.tokenize_file import tokenize_parquet
cpu, wall = time.process_time(), time.perf_counter()
tokenize_parquet(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3])
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
print(json.dumps({**spent, "peak_bytes": memory}))
"""


def write_items(path: Path, count: int) -> None:
    """Writes rows of length 1 around 512 centers, a part at a time."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((512, WIDTH), dtype=np.float32)
    parts = []
    for start in range(0, count, ROWS_PER_CHUNK):
        rows = min(ROWS_PER_CHUNK, count - start)
        x = centers[draw.integers(0, 512, rows)]
        x += 0.7 * draw.standard_normal((rows, WIDTH), dtype=np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        vectors = pl.Series("embedding", x, dtype=pl.Array(pl.Float32, WIDTH))
        ids = pl.Series("item_id", [f"item-{row}" for row in range(start, start + rows)])
        parts.append(path.with_suffix(f".{start}"))
        pl.DataFrame([ids, vectors.cast(pl.List(pl.Float32))]).write_parquet(parts[-1])
    pl.scan_parquet(parts).sink_parquet(path, row_group_size=ROWS_PER_CHUNK)
    for part in parts:
        part.unlink()


def encode_rates(model: RQVAE, x: dict[str, torch.Tensor]) -> dict[str, float]:
    """Items a CPU second of encoder and search, and of the search alone; the best of five."""
    latents = model.latents(x)
    rates = {}
    for name, job in (
        ("encode", lambda: model.encode(x)),
        ("search", lambda: model.quantizer.encode(latents)),
    ):
        seconds = []
        for _ in range(5):
            start = time.process_time()
            job()
            seconds.append(time.process_time() - start)
        rates[name] = len(latents) / min(seconds)
    return rates


def start(file: Path, output: Path, model: Path) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", CHILD, *map(str, (file, output, model)), threads]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="folder for 1.5 GB of work; default: a new one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        print(save_result(NAME, run(Path(work), options.items)))


def run(work: Path, count: int) -> dict[str, Any]:
    """Makes the items, tokenizes them twice and compares the tables."""
    file, model_folder = work / "items.parquet", work / "fitted"
    write_items(file, count)
    sample = EmbeddingFile(file).sample(ROWS_PER_CHUNK, seed=0)
    model = fit_tokenizer(sample, codebook_sizes=SIZES, epochs=3)
    assert isinstance(model, RQVAE)
    model.save_pretrained(model_folder)
    rates = encode_rates(model, sample)
    child = start(file, work / "whole", model_folder)
    spent = json.loads(child.communicate()[0])
    cut_off = start(file, work / "cut", model_folder)
    parts = work / "cut" / "partial" / "parts"
    half = -(-count // ROWS_PER_CHUNK) // 2
    while len(list(parts.glob("*.parquet"))) < half and cut_off.poll() is None:
        time.sleep(0.02)
    os.kill(cut_off.pid, signal.SIGKILL)
    killed = cut_off.wait() == -signal.SIGKILL
    kept = len(list(parts.glob("*.parquet")))
    resumed = json.loads(start(file, work / "cut", model_folder).communicate()[0])
    tables = [SidTable.load(work / name) for name in ("whole", "cut")]
    return {
        "items": count,
        "distinct_ids": len(set(tables[1].item_ids)),
        "sizes": SIZES,
        "threads": torch.get_num_threads(),
        "rates": rates,
        "whole": spent,
        "killed": killed,
        "parts_kept": kept,
        "resumed": resumed,
        "same_table": tables[0].digest == tables[1].digest,
    }


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md."""
    count, spent, again = result["items"], result["whole"], result["resumed"]
    rows = [
        [what, f"{rate:,.0f}", f"{2 * rate:,.0f}", target]
        for what, rate, target in (
            ("search of 3 levels alone", result["rates"]["search"], ""),
            ("encoder and search", result["rates"]["encode"], "200,000"),
            ("Parquet to SID table", count / spent["cpu"], "100,000"),
        )
    ]
    sizes, threads = " x ".join(map(str, result["sizes"])), result["threads"]
    lines = [
        "## Tokenizing a million items",
        "",
        "`python -m benchmarks.quality.tokenize_million`",
        "",
        *table(["work", "items a CPU second", "times 2 cores", "target"], rows, words=1),
        "",
        *filled(
            f"""{count:,} rows of {WIDTH} numbers, an RQ-VAE with the default encoder (512 hidden,
            64 latent) and {sizes} codes, {threads} thread(s). Machines are shared, so CPU seconds
            are counted, and the rate of two cores is twice that of one, not a measured one; the
            clock said {spent["wall"]:.0f} s for {spent["cpu"]:.0f} CPU seconds.

            The process took at most {spent["peak_bytes"] / 1e9:.1f} GB of memory. Killed with
            {result["parts_kept"]} parts done and started again, it took {again["cpu"]:.0f} CPU
            seconds more and ended with {"the same" if result["same_table"] else "another"} table:
            {result["distinct_ids"]:,} items, each once."""
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
