"""Writes the tables of figures in README.md and docs/ from the newest result files.

Usage: python -m benchmarks.tables

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``; NAME is a function of this
file. Figures of speed come from the newest file in ``benchmarks/results`` that has them, by the
date at the end of its name, with one thread and at full size, or from a GPU, whose sizes are always
the same; those of recommendation quality from ``quality/recommendation.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

from plum.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "drop_in.md", ROOT / "docs" / "speed.md")
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DATED = re.compile(r"\d{4}-\d\d-\d\d$")
_TIMES = "\N{MULTIPLICATION SIGN}"
# The SIDs of the generator that is shown, the best first.
_SIDS = ("fused, multi-resolution", "fused")
# How many children of a beam STATIC considers after the first code: as many as there are beams are
# enough for the same answer.
_STATIC = {"W children": "STATIC, W children a beam", "all children": "STATIC"}
# Behind the name of a peer that is measured with another setting of its BLAS too.
TUNED = ", tuned BLAS"
Figures = dict[tuple[str, str], dict[str, Any]]


class Source:
    """What one benchmark measured: figures by provider and shape, and where they stand."""

    def __init__(
        self, op: str, *, size: str = "full", device: str = "cpu", isa: str | None = None
    ) -> None:
        """Reads the newest result of ``bench_<op>_<device>`` at a size, of a GPU at any.

        ``isa`` names the instruction set of the CPU, which may be any.

        Raises:
            LookupError: no file has it.
        """
        # What `make bench` leaves there has no date.
        dated = (path for path in RESULTS.glob("*.json") if _DATED.search(path.stem))
        files = sorted(dated, key=lambda path: (path.stem[-10:], path.stem), reverse=True)
        for path in files:
            results = json.loads(path.read_text(encoding="utf-8"))
            # Sweeps have another form.
            facts = results.get("machine_info", {})
            if device == "cpu" and facts.get("size") != size:
                continue
            if isa is not None and facts.get("isa") != isa:
                continue
            self.figures: Figures = {
                (bench["params"]["provider"], bench["params"]["shape"]): {
                    **bench["extra_info"],
                    "seconds": bench["stats"]["min"],
                }
                for bench in results.get("benchmarks", [])
                if bench["name"].startswith(f"bench_{op}_{device}[")
                and bench["params"].get("threads", 1) == 1
            }
            if self.figures:
                where = f"one thread of {facts['cpu']} ({facts['isa']})"
                if device == "gpu":
                    where = f"one {facts['gpu']}"
                self.ceilings = results["ceilings"]
                self.file = path.name
                self.place = f"`benchmarks/results/{path.name}`: {where}, torch {facts['torch']}"
                return
        raise LookupError(f"no result of {op} at size {size} in {RESULTS}")

    def get(self, provider: str, shape: str, what: str = "rows_per_second") -> float | None:
        return self.figures.get((provider, shape), {}).get(what)

    def times(self, ours: str, theirs: str, shape: str) -> float | None:
        """How many times as fast ``ours`` is."""
        rates = self.get(ours, shape), self.get(theirs, shape)
        return rates[0] / rates[1] if rates[0] and rates[1] else None


def recommendation() -> list[str]:
    """Test Recall@10 of the generator beside the baselines, by data set and device."""
    path = RESULTS / "quality" / "recommendation.json"
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    baselines: dict[str, dict[str, str]] = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        if run["model"] in ("popularity", "item_knn"):
            baselines.setdefault(run["dataset"], {})[run["model"]] = _recall([run])
        # Variants, and what has no place in this table, are in docs/results.md.
        elif run["model"] in ("generator", "sasrec") and not run["variant"]:
            place = run["dataset"], run["device"].removeprefix("NVIDIA ")
            found.setdefault(place, {}).setdefault(run["sids"] or run["model"], []).append(run)
    titles = {"ml-1m": "MovieLens-1M, 3,416 items", "beauty": "Amazon Beauty, 12,101 items"}
    rows = []
    for dataset, device in sorted(found, key=lambda place: list(titles).index(place[0])):
        row = [titles[dataset], device]
        models = found[dataset, device]
        for names in (_SIDS, ("sasrec",)):
            runs = next((models[name] for name in names if name in models), [])
            seconds = fmean(run["train_seconds"] for run in runs) if runs else 0.0
            size = runs[0]["parameters"] / 1e6 if runs else 0.0
            facts = f"({size:.1f} M, {len(runs)}, {seconds:.0f} s)"
            row.append(f"{_recall(runs)} {facts}" if runs else "")
        rows.append([*row, *(baselines[dataset][model] for model in ("item_knn", "popularity"))])
    generator = "generator (parameters, seeds, training)"
    heads = ("device", generator, "SASRec", "ItemKNN", "popularity")
    return _table("test Recall@10, seen items kept / left out", heads, rows)


def _recall(runs: Sequence[dict[str, Any]]) -> str:
    """Mean Recall@10 with seen items kept, and left out where every run was scored so."""
    kinds = [kind for kind in ("metrics", "metrics_unseen") if all(kind in run for run in runs)]
    return " / ".join(f"{fmean(run[kind]['recall@10'] for run in runs):.3f}" for kind in kinds)


def summary() -> list[str]:
    """How many times as fast as the best known peer of each kind, on three CPUs."""
    isas = {"AMX": "amx_bf16", "AVX-512 with VNNI": "avx512_vnni",
            "AVX-512 with VNNI and bf16": "avx512_bf16"}  # fmt: skip
    search, kmeans, step = (
        {isa: Source(op, isa=isa) for isa in isas.values()}
        for op in ("residual_quantize", "kmeans", "training_step")
    )
    torch, vector = ("torch addmm + argmin",), ("vector-quantize-pytorch",)
    decode = {isa: Source("trie_decode", isa=isa) for isa in isas.values() if isa != "amx_bf16"}
    # The Xeon's file is of before plum told VNNI apart, which no op of a search uses.
    generate = [Source("generate", isa=isa) for isa in ("avx512", "avx512_bf16")]

    def on_each(
        sources: dict[str, Source], ours: str, peers: Sequence[str], shape: str
    ) -> list[str]:
        return [_over(sources[isa], (ours,), peers, shape) for isa in isas.values()]

    shape = "D=384 3x256"
    rows = [
        [f"search of {_shapes([shape])[0]}: torch's `addmm` + `argmin`",
         *on_each(search, "plum cpu", torch, shape)],
        ["the same: vector-quantize-pytorch", *on_each(search, "plum cpu", vector, shape)],
        ["a training step of it: vector-quantize-pytorch's `ResidualVQ`",
         *on_each(step, "plum ResidualVQ", vector, shape)],
        ["k-means, 2,048 clusters: faiss",
         *on_each(kmeans, "plum KMeans", ("faiss Kmeans",), "D=384 K=2048")],
        *([f"a constrained decode, 8 {_TIMES} 64 beams: STATIC with {of} a beam", "",
           *(_over_catalogs(source, "plum cpu", "8x64", peer) for source in decode.values())]
          for of, peer in _STATIC.items()),
        ["a whole search, GPT-2-small shape: transformers' `generate`", "",
         *(_over(source, ("plum full",), ("transformers generate",), "256 tokens, W=32, L=3")
           for source in generate)],
    ]  # fmt: skip
    files = [*search.values(), *decode.values(), *generate]
    names = ", ".join(dict.fromkeys(f"`{each.file}`" for each in files))
    return [
        f"From `benchmarks/results/`: {names}.",
        "",
        *_table("times as fast as", tuple(isas), rows),
    ]


def residual_quantize(isa: str = "amx_bf16") -> list[str]:
    """Rates of plum, and how many times as fast it is as each peer."""
    source = Source("residual_quantize", isa=isa)
    shapes = ("D=384 3x256", "D=384 2048+1024+512", "D=384 3x64", "D=32 3x256")
    peers = {
        "torch `addmm` + `argmin`, in chunks": ("torch addmm + argmin",),
        "oneDNN in fp32, in chunks": ("torch oneDNN + argmax",),
        "faiss `ResidualQuantizer`, the better variant": (
            "faiss ResidualQuantizer",
            "faiss ResidualQuantizer LUT",
        ),
        "faiss `IndexFlatL2` a level": ("faiss IndexFlatL2",),
        "vector-quantize-pytorch, eval": ("vector-quantize-pytorch",),
        "RQ-VAE-Recommender": ("RQ-VAE-Recommender",),
        "MiniOneRec": ("MiniOneRec",),
        "GRID": ("GRID",),
    }
    rows = [["plum"] + [_number(source.get("plum cpu", shape), 1e6) for shape in shapes]]
    rows += [
        [label, *(_over(source, ("plum cpu",), names, shape) for shape in shapes)]
        for label, names in peers.items()
    ]
    for kind in ("integers", "fp32"):
        ours, peer = (f"plum cpu {kind}",), ("torch addmm + argmin",)
        if source.get(*ours, shapes[0]) is not None:
            row = [_over(source, ours, peer, shape) for shape in shapes]
            rows.append([f"the search in {kind}: over torch", *row])
    best, share = source.ceilings["1 thread(s)"]["fp32"], []
    for shape in shapes:
        rate = source.get("plum cpu fp32", shape) or 0
        share.append(f"{rate * 2 * _products(shape) / best:.0%}")
    rows.append(["the search in fp32: of the rate of torch's fastest fp32 product", *share])
    head = "`residual_quantize`, million rows/s, and times as fast as"
    return [_from(source), "", *_table(head, _shapes(shapes), rows)]


def residual_quantize_gpu() -> list[str]:
    """Nanoseconds a row on a GPU, and how many times as fast the faster backend is as each peer."""
    source = Source("residual_quantize", device="gpu")
    shapes = ("D=384 3x256", "D=384 2048+1024+512", "D=384 8x2048", "D=32 3x256")
    backends = ("plum wgmma", "plum cuda", "plum triton")
    rows = []
    for backend in backends:
        if source.get(backend, shapes[0]) is None:
            continue
        rates = [source.get(backend, shape) for shape in shapes]
        rows.append(
            [
                f'`backend="{backend.split()[1]}"`',
                *(_number(1e9 / r, 1) if r else "" for r in rates),
            ]
        )
    for label, peer in (
        ("torch `addmm` + `argmin` in fp32", "torch addmm + argmin"),
        ("the same in TF32, not exact", "torch addmm + argmin, TF32"),
        ("torch `cdist`", "torch cdist"),
        ("vector-quantize-pytorch", "vector-quantize-pytorch"),
    ):
        rows.append([label, *(_over(source, backends, (peer,), shape) for shape in shapes)])
    head = "`residual_quantize`, ns a row, and times as fast as"
    return [_from(source), "", *_table(head, _shapes(shapes), rows)]


def trie_step_gpu() -> list[str]:
    """Microseconds a beam step on a GPU, in a CUDA graph and without one, beside STATIC's."""
    source = Source("trie_step", device="gpu")
    shapes = tuple(shape for provider, shape in source.figures if provider == "STATIC")
    rows = []
    for label, provider in (
        ('`score="full"`, in a CUDA graph', "plum triton"),
        ('`score="valid"`, in a CUDA graph', "plum triton valid"),
        ('`score="full"`, eager', "plum triton, no graph"),
        ("STATIC, eager", "STATIC"),
    ):
        times = [source.get(provider, shape, "microseconds_per_step") for shape in shapes]
        rows.append([label, *(f"{time:.0f}" if time else "" for time in times)])
    for label, ours in (
        ("eager, times as fast as STATIC", "plum triton, no graph"),
        ("in a graph, times as fast as STATIC eager", "plum triton"),
    ):
        rows.append([label, *(_over(source, (ours,), ("STATIC",), shape) for shape in shapes)])
    return [_from(source), "", *_table("µs a step", shapes, rows)]


def kmeans(isa: str = "amx_bf16") -> list[str]:
    """How many times as fast ten iterations are."""
    source = Source("kmeans", isa=isa)
    shapes = ("D=384 K=256", "D=384 K=2048", "D=32 K=256")
    labels = {
        "faiss": "faiss Kmeans",
        "scikit-learn": "scikit-learn KMeans",
        "superkmeans": "superkmeans",
        "vector-quantize-pytorch": "vector-quantize-pytorch kmeans",
    }
    rows = [
        [label, *(_over(source, ("plum KMeans",), (peer,), shape) for shape in shapes)]
        for label, peer in labels.items()
    ]
    titles = ("64k rows, D=384, K=256", "64k, 384, 2048", "200k, 32, 256")
    return [_from(source), "", *_table("k-means, 10 iterations, times as fast as", titles, rows)]


def training_step(isa: str = "amx_bf16") -> list[str]:
    """How many times as fast a step of ResidualVQ is."""
    source = Source("training_step", isa=isa)
    shapes = ("D=384 3x256", "D=384 2048+1024+512", "D=32 3x256")
    rows = [
        [f"vector-quantize-pytorch{kind}"]
        + [_over(source, (f"plum ResidualVQ{kind}",), (f"vector-quantize-pytorch{kind}",), shape)
           for shape in shapes]
        for kind in ("", ", expiry")
    ]  # fmt: skip
    head = "a training step of `ResidualVQ`, 8,192 rows, times as fast as"
    return [_from(source), "", *_table(head, _shapes(shapes), rows)]


_BEAMS = {
    name: name.replace("x", f" {_TIMES} ") + " rows" for name in ("1x32", "2x70", "8x64", "32x128")
}


def trie_mask(isa: str = "avx512_vnni") -> list[str]:
    """How many times as fast masks are as the peers', over the catalogs."""
    source = Source("trie_mask", isa=isa)
    rows = []
    for title, ours, peer in (
        ("transformers' prefix function", "plum cpu new tensor", "transformers prefix function"),
        ("the same, plum in place", "plum cpu", "transformers prefix function"),
        ("MiniOneRec's processor", "plum cpu new tensor", "MiniOneRec processor"),
        ("xgrammar's bitmask, in place", "plum cpu", "xgrammar bitmask"),
    ):
        for where, wide in (("wide nodes", True), ("deeper", False)):
            row = [f"{title}, {where}"]
            for name in _BEAMS:
                found = [
                    ratio
                    for provider, shape in source.figures
                    if provider == ours
                    and f" {name} " in shape
                    and shape.endswith("level 1") == wide
                    and (ratio := source.times(ours, peer, shape))
                ]
                row.append(f"{_times(min(found))} to {_times(max(found))}" if found else "")
            rows.append(row)
    row = ["share of the time in place that `fill_` of the rows takes"]
    for name in _BEAMS:
        shares = [
            share
            for provider, shape in source.figures
            if provider == "torch fill_" and f" {name} " in shape
            if (share := source.times("plum cpu", provider, shape))
        ]
        row.append(f"{min(shares):.0%} to {max(shares):.0%}" if shares else "")
    return [
        _from(source),
        "",
        *_table("masks, times as fast as", tuple(_BEAMS.values()), [*rows, row]),
    ]


def trie_filter(isa: str = "avx512_vnni") -> list[str]:
    """What a filter and a deny list add to a step and to a search, in how many cases how much."""
    source, searches = (Source(f"trie_{what}", isa=isa) for what in ("filter", "limited_decode"))
    rows = []
    for label, measured, denies, asked in (
        ("a step, one filter", source, False, 1.25),
        ("a step, and 1,000 denied items", source, True, 2),
        ("a whole search with both, the denied items prepared in it", searches, True, 2),
    ):
        found = sorted(
            figures["times_beside"]
            for (provider, _), figures in measured.figures.items()
            if provider != "plum cpu" and ("deny" in provider) == denies
        )
        within = sum(ratio <= asked for ratio in found)
        cells = f"{within} of {len(found)} at most {asked}"
        rows.append([label, f"{median(found):.2f}", f"{found[-1]:.2f}", cells])
    heads = ("median", "most", "cases")
    return [_from(source), "", *_table("times as long as without", heads, rows)]


def trie_decode(isa: str = "avx512_vnni") -> list[str]:
    """The geometric mean over catalogs, and the worst, of how many times as fast as STATIC."""
    source = Source("trie_decode", isa=isa)
    beams = {"1x32": f"1 {_TIMES} 32 beams", "2x70": f"2 {_TIMES} 70", "8x64": f"8 {_TIMES} 64",
             "32x128": f"32 {_TIMES} 128"}  # fmt: skip
    rows = []
    for of, peer in _STATIC.items():
        for score, provider in (("full", "plum cpu"), ("valid", "plum cpu valid")):
            cells = [_over_catalogs(source, provider, name, peer) for name in beams]
            if any(cells):
                rows.append([f'`score="{score}"`, STATIC with {of} a beam', *cells])
    head = "whole decode, times as fast as STATIC: mean over the catalogs (worst)"
    return [_from(source), "", *_table(head, tuple(beams.values()), rows)]


def _over_catalogs(source: Source, provider: str, beams: str, peer: str) -> str:
    shapes = [
        shape for ours, shape in source.figures if ours == provider and shape.endswith(f" {beams}")
    ]
    ratios = [source.times(provider, peer, shape) for shape in shapes]
    known = [ratio for ratio in ratios if ratio]
    return f"{_times(geometric_mean(known))} ({_times(min(known))})" if known else ""


def trie_build(isa: str = "avx512_vnni") -> list[str]:
    """Time and bytes of the indexes of five million SIDs."""
    source = Source("trie_build", isa=isa)
    shapes = ("uniform L3 5M", "uniform L8 5M")

    def both(cells: Sequence[str]) -> str:
        return " / ".join(cells)

    ours = [source.figures["plum cpu", shape] for shape in shapes]
    rows = [[
        "`SidTrie`",
        both([f"{each['seconds']:.1f} s" for each in ours]),
        both([f"{each['bytes_per_item']:.1f}" for each in ours]),
    ]]  # fmt: skip
    labels = {
        "STATIC": "STATIC",
        "nested dict": "nested dict, as for transformers' prefix function",
        "marisa-trie": "marisa-trie",
    }
    for provider, label in labels.items():
        theirs = [source.figures[provider, shape] for shape in shapes]
        longer = [a["seconds"] / b["seconds"] for a, b in zip(theirs, ours, strict=True)]
        more = [
            a["bytes_per_item"] / b["bytes_per_item"] for a, b in zip(theirs, ours, strict=True)
        ]
        as_long, as_many = both(list(map(_times, longer))), both(list(map(_times, more)))
        rows.append([label, f"{as_long} as long", f"{as_many} as many"])
    heads = ("build from unsorted codes, sort included", "bytes a SID, item ids apart")
    return [_from(source), "", *_table("5 million SIDs, 3 / 8 levels", heads, rows)]


def trie_large() -> list[str]:
    """What fifty million SIDs take."""
    build, growth = Source("trie_build", size="small"), Source("trie_growth", size="small")
    seconds = build.figures["plum cpu", "uniform L8 50M"]["seconds"]
    ratios = [
        growth.figures["plum cpu, 50 times the SIDs", shape]["seconds"] / figures["seconds"]
        for (provider, shape), figures in growth.figures.items()
        if provider == "plum cpu"
    ]
    return [
        f"Fifty million SIDs of 8 levels are built in {seconds:.0f} s; a step then takes"
        f" {min(ratios):.1f} to {max(ratios):.1f} times as long",
        f"as with one million. {_from(build)}",
    ]


def generate(isa: str = "avx512") -> list[str]:
    """SidBeamSearch beside generate of transformers."""
    return _searches(Source("generate", isa=isa), "search with a GPT-2-small shape")


def generate_run() -> list[str]:
    """The same on the trained model of a run."""
    source = Source("generate_run")
    size = max(facts.get("parameters", 0) for facts in source.figures.values())
    return _searches(source, f"search with a trained GPT-2 shape of {size / 1e6:.1f} M parameters")


def _searches(source: Source, what: str) -> list[str]:
    shapes = tuple(dict.fromkeys(shape for _, shape in source.figures))
    peer = "transformers generate"
    rows = [
        [f'times as fast, `score="{score}"`']
        + [_over(source, (f"plum {score}",), (peer,), shape) for shape in shapes]
        for score in ("full", "valid")
    ]
    for label, key in (
        ("time outside the model", "share_outside_the_model"),
        ("model steps saved", "share_of_steps_saved"),
    ):
        shares = [source.get("plum full", shape, key) or 0.0 for shape in shapes]
        rows.append([label, *(f"{share:.1%}" for share in shares)])
    head = f"{what}, beside `generate` with a prefix function"
    return [_from(source), "", *_table(head, shapes, rows)]


def drop_in() -> list[str]:
    """How many times as fast other systems' own loops are with plum in them."""
    source = Source("drop_in")
    rows = []
    for provider, shape in source.figures:
        if provider != "as it is":
            continue
        system, loop = shape.split(", ")
        ratio = source.times("plum dropped in", provider, shape)
        share = source.get("plum dropped in", shape, "share_equal")
        if ratio is not None and share is not None:
            rows.append([system, loop, _times(ratio), f"{share:.2%}"])
    heads = ("its own loop", "times as fast with plum", "codes or beams that are the same")
    return [_from(source), "", *_table("system", heads, rows)]


def scaling() -> list[str]:
    """Where the curves of docs/figures/scaling.svg come from."""
    search, decode = Source("search_scaling"), Source("decode_scaling")
    if search.place == decode.place:
        return [_from(search)]
    return [f"From {search.place}; the decode from {decode.place}."]


def _from(source: Source) -> str:
    return f"From {source.place}."


def _shapes(shapes: Sequence[str]) -> tuple[str, ...]:
    spelled = (shape.replace(" ", ", ", 1) for shape in shapes)
    return tuple(re.sub(r"(\d)x", rf"\1 {_TIMES} ", shape) for shape in spelled)


def _products(shape: str) -> int:
    """Multiplications a row, as 384 times 768 of ``D=384 3x256``."""
    width, books = re.fullmatch(r"D=(\d+) (\S+)", shape).groups()
    parts = [part.rpartition("x") for part in books.split("+")]
    return int(width) * sum(int(times or 1) * int(size) for times, _, size in parts)


def _over(source: Source, ours: Sequence[str], peers: Sequence[str], shape: str) -> str:
    """How many times as fast the fastest of ours is as the fastest of the peers, tuned or not."""
    rates = [
        [rate for name in names if (rate := source.get(name, shape))]
        for names in (ours, [*peers, *(peer + TUNED for peer in peers)])
    ]
    return _times(max(rates[0]) / max(rates[1])) if all(rates) else ""


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.2f}"


def _times(value: float) -> str:
    return (f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}") + _TIMES


def _table(head: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {head} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


# Shown of several CPUs; of the first three the default is AMX.
_ON_SEVERAL = (
    *(residual_quantize, kmeans, training_step),
    *(trie_decode, trie_mask, trie_filter, trie_build, generate),
)
TABLES: dict[str, Callable[[], list[str]]] = {
    "recommendation": recommendation,
    "summary": summary,
    "residual_quantize": residual_quantize,
    "residual_quantize_gpu": residual_quantize_gpu,
    "trie_step_gpu": trie_step_gpu,
    "kmeans": kmeans,
    "training_step": training_step,
    "trie_decode": trie_decode,
    "trie_mask": trie_mask,
    "trie_filter": trie_filter,
    "trie_build": trie_build,
    "trie_large": trie_large,
    "generate": generate,
    "generate_run": generate_run,
    "drop_in": drop_in,
    "scaling": scaling,
    **{f"{table.__name__}_vnni": partial(table, "avx512_vnni") for table in _ON_SEVERAL[:3]},
    **{f"{table.__name__}_bf16": partial(table, "avx512_bf16") for table in _ON_SEVERAL},
}


def filled(text: str) -> str:
    """Returns a page with its tables made anew.

    Raises:
        KeyError: a name is no table.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}\n" + "\n".join(TABLES[m[2]]()) + f"\n\n{m[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8")))
        print(page)
