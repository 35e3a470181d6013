"""The ``plum`` command: one verb per stage, ``run`` for all of them, ``doctor`` for the machine."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plum.errors import MissingDependency, PlumError

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # pragma: no cover
    print(f"error: {MissingDependency(str(error.name), 'pipeline', 'the plum command')}")
    raise SystemExit(1) from None

if TYPE_CHECKING:
    from plum.config import Config

app = typer.Typer(
    help="Generative recommendation on Semantic IDs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="synthetic, ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, amazon, tables."),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the data set's files.")]
Items = Annotated[Path | None, typer.Option(help="Your items, Parquet or CSV (--dataset tables).")]
Interactions = Annotated[
    Path | None, typer.Option(help="Your interactions, Parquet or CSV (--dataset tables).")
]
Preset = Annotated[str | None, typer.Option(help="demo, cpu or gpu.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML configuration.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, as section.key=value; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def main() -> None:
    """Runs the command line; an expected error is one line and exit status 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        code = app(standalone_mode=False)
    except PlumError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # A usage error of typer's own, e.g. an option that does not exist.
        print(f"error: {error.format_message()} (plum --help)", file=sys.stderr)
        code = 2
    raise SystemExit(code or 0)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Shows which plum this is, how it was built and which backend every op uses here."""
    from plum.doctor import diagnose

    report = diagnose()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in report["facts"].items():
        facts.add_row(f"[bold]{name}", str(value))
    ops = Table("op", "backend", "here", "automatic on", title="ops", title_justify="left")
    for row in report["ops"]:
        here = "[green]yes" if row["missing"] is None else f"[dim]{row['missing']}"
        ops.add_row(row["op"], row["backend"], here, ", ".join(row["automatic_on"]))
    out = Console()
    out.print(facts, ops)
    for warning in report["warnings"]:
        out.print(f"[yellow]warning:[/] {warning}")


@app.command()
def run(
    output: Output,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    items: Items = None,
    interactions: Interactions = None,
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Runs every stage into one folder; run again, it does only what changed."""
    from plum.pipeline.run import finish
    from plum.pipeline.stages import STAGES

    resolved = _resolve(output, dataset, data_dir, items, interactions, preset, config, settings)
    _run(resolved, output, list(STAGES))
    metrics = finish(output)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    _print_metrics(metrics)
    console.print(f"page: {output / 'report.html'}")


def _stage_command(name: str, help_text: str) -> None:
    @app.command(name=name, help=help_text)
    def command(
        output: Output,
        dataset: Dataset = None,
        data_dir: DataDir = None,
        items: Items = None,
        interactions: Interactions = None,
        preset: Preset = None,
        config: ConfigFile = None,
        settings: Settings = None,
    ) -> None:
        resolved = _resolve(
            output, dataset, data_dir, items, interactions, preset, config, settings
        )
        _run(resolved, output, [name])


_stage_command("data", "Reads a data set into items.parquet and interactions.parquet.")
_stage_command("embed", "Encodes the text of every item.")
_stage_command("tokenize", "Trains the quantizer and writes the SID table.")
_stage_command("index", "Builds the trie of the catalog.")
_stage_command("finetune", "Trains the generator to write the next item's SID.")
_stage_command("evaluate", "Scores the generator and the baselines on the test items.")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A SID table, or a run.")], as_json: AsJson = False
) -> None:
    """Shows the quality of a SID table: usage, perplexity, dead codes, collisions."""
    from plum.sid import SidTable, quality_report

    folder = path / "tokenize" / "table" if (path / "tokenize" / "table").is_dir() else path
    table = SidTable.load(folder)
    quality = quality_report(table.codes, table.codebook_sizes)
    if as_json:
        print(json.dumps(quality, indent=2))
        return
    levels = Table("level", "codes", "usage", "perplexity", "dead", title=str(folder))
    for number, level in enumerate(quality["levels"], 1):
        levels.add_row(
            str(number),
            str(table.codebook_sizes[number - 1]),
            f"{level['usage']:.1%}",
            f"{level['perplexity']:.1f}",
            str(level["dead"]),
        )
    Console().print(levels)
    Console().print(
        f"unique SIDs {quality['unique_sid_ratio']:.2%}, "
        f"most items on one SID {quality['max_collision']}"
    )


@app.command()
def recommend(
    run_dir: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    history: Annotated[str, typer.Option(help="Item ids, oldest first, separated by commas.")],
    num_items: Annotated[int, typer.Option("--num-items", "-k", help="How many items.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Recommends items for a history: titles, SIDs and scores."""
    from plum.config import load_config
    from plum.pipeline.recommender import Recommender

    recommender = Recommender.load(run_dir, load_config(run_dir / "config.json"))
    ids = [item.strip() for item in history.split(",") if item.strip()]
    found = recommender.recommend(ids, num_items)
    if as_json:
        print(json.dumps([vars(item) for item in found], indent=2, ensure_ascii=False))
        return
    table = Table("", "item", "title", "SID", "score")
    for rank, item in enumerate(found, 1):
        sid = "-".join(map(str, item.sid))
        table.add_row(str(rank), item.item_id, item.title, sid, f"{item.score:.3f}")
    Console().print(table)


def _resolve(
    output: Path,
    dataset: str | None,
    data_dir: Path | None,
    items: Path | None,
    interactions: Path | None,
    preset: str | None,
    file: Path | None,
    settings: list[str] | None,
) -> Config:
    """Resolves the options; a run that exists keeps its configuration unless they say otherwise."""
    from plum.config import resolve_config
    from plum.files import read_json

    settings = list(settings or [])
    for key, value in (("data_dir", data_dir), ("items", items), ("interactions", interactions)):
        if value is not None:
            settings.append(f"data.{key}={json.dumps(str(value))}")
    saved = output / "config.json"
    if saved.exists() and dataset is None and preset is None and file is None:
        return resolve_config(settings=settings, base=read_json(saved))
    return resolve_config(
        preset=preset or "cpu", dataset=dataset or "synthetic", file=file, settings=settings
    )


def _run(config: Config, output: Path, names: list[str]) -> None:
    from plum.pipeline.run import Outcome, run_stages

    def say(outcome: Outcome) -> None:
        if outcome.ran:
            console.print(f"[green]{outcome.stage}[/] done in {outcome.seconds:.1f} s")
        else:
            console.print(f"[dim]{outcome.stage} is up to date[/]")

    with _progress() as progress_of:
        run_stages(config, output, names, progress_of=progress_of, on_done=say)


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:

        def progress_of(stage: str) -> Any:
            for old in bars.task_ids:
                bars.remove_task(old)
            task = bars.add_task(stage, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield progress_of


def _print_metrics(metrics: dict[str, dict[str, float]]) -> None:
    names = ["recall@1", "recall@5", "recall@10", "recall@50", "ndcg@10", "mrr@10"]
    table = Table("test users, full ranking", *names)
    for model, values in metrics.items():
        best = [
            f"[bold]{values[name]:.4f}"
            if values[name] == max(other[name] for other in metrics.values())
            else f"{values[name]:.4f}"
            for name in names
        ]
        table.add_row(model, *best)
    Console().print(table)


if __name__ == "__main__":
    main()
