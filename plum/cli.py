"""The ``plum`` command: ``run`` for all stages, verbs for single ones, tables and the machine."""

from __future__ import annotations

import csv
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plum.errors import InvalidArgument, InvalidData, MissingDependency, PlumError

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:  # pragma: no cover
    print(f"error: {MissingDependency(str(error.name), 'pipeline', 'the plum command')}")
    raise SystemExit(1) from None

from plum.bench_commands import app as bench_app

if TYPE_CHECKING:
    from plum.config import Config

app = typer.Typer(
    help="Generative recommendation on Semantic IDs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
# Titles and paths are shown as they are: escaped where they are printed, and ":100:" is no emoji.
console = Console(stderr=True, emoji=False)
out = Console(emoji=False)

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

# Typer makes this status or an Abort of a KeyboardInterrupt, which depends on its version.
_INTERRUPTED = 130


def main() -> None:
    """Runs the command line; an expected error is one line and exit status 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        _refuse_empty(sys.argv)
        code = app(standalone_mode=False)
    except PlumError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except typer.Abort:
        code = _INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):
            # A usage error of typer's own, e.g. an option that does not exist; it says nothing
            # where the help has been shown because there are no arguments.
            if message := error.format_message():
                print(f"error: {message} (plum --help)", file=sys.stderr)
            code = 2
        elif not debug and (refusal := _refusal(error)) is not None:
            print(f"error: {refusal}", file=sys.stderr)
            code = 1
        else:
            raise
    if code == _INTERRUPTED:
        goes_on = "" if sys.argv[1:2] == ["bench"] else "; the same command goes on from here"
        print(f"interrupted{goes_on}", file=sys.stderr)
    raise SystemExit(code or 0)


def _refuse_empty(arguments: list[str]) -> None:
    """Raises InvalidArgument for an empty argument: as a path it would be the current folder."""
    for before, argument in pairwise(arguments):
        option, equals, value = argument.partition("=") if argument[:2] == "--" else ("", "", "")
        if argument == "" or (equals and not value):
            name = option or (before if before[:1] == "-" else "an argument")
            if name == "--history":  # that of someone new
                continue
            hint = "is a variable of the shell not set?"
            raise InvalidArgument(name, "a value", "an empty one", hint)


def _refusal(error: Exception) -> str | None:
    """Says in one line what the system refused, and for which file; None if it did not."""
    text = " ".join(str(error).split())
    if not isinstance(error, OSError):
        # Parquet and safetensors are written in Rust, whose errors say only this.
        return text if "(os error " in text else None
    path = error.filename if error.filename2 is None else error.filename2
    reason = error.strerror or text or type(error).__name__
    return reason if path is None else f"{path}: {reason}"


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
        facts.add_row(f"[bold]{name}", escape(str(value)))
    ops = Table("op", "backend", "here", "automatic on", title="ops", title_justify="left")
    for row in report["ops"]:
        here = "[green]yes" if row["missing"] is None else f"[dim]{escape(row['missing'])}"
        ops.add_row(row["op"], row["backend"], here, ", ".join(row["automatic_on"]))
    out.print(facts, ops)
    for warning in report["warnings"]:
        out.print(f"[yellow]warning:[/] {escape(warning)}")


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
    _say_page(output / "report.html")


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
        if name == "evaluate":
            from plum.pipeline.run import finish

            _print_metrics(finish(output))
            _say_page(output / "report.html")


_stage_command("data", "Reads a data set into items.parquet and interactions.parquet.")
_stage_command("embed", "Encodes the text of every item.")
_stage_command("index", "Builds the trie of the catalog.")
_stage_command("pretrain", "Teaches a language model SIDs: what users took, what items are.")
_stage_command("finetune", "Trains the generator to write the next item's SID.")
_stage_command("evaluate", "Scores the generator and the baselines on the test items.")


@app.command()
def tokenize(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run or table.")],
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Your own embeddings: Parquet with item_id and columns of lists."),
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Codes a level, e.g. 256,256,256.")] = None,
    kind: Annotated[str | None, typer.Option(help="rq-kmeans, rq-vae or r-vq.")] = None,
    collisions: Annotated[
        str | None, typer.Option(help="accept, suffix, nearest_free or balanced.")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="A column of embeddings; repeatable. Default: all.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A saved tokenizer to encode with; default: fit one.")
    ] = None,
    sample_rows: Annotated[int | None, typer.Option(help="Items to fit on.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Give SIDs to the items that the table lacks.")
    ] = False,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    items: Items = None,
    interactions: Interactions = None,
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Gives items their SIDs: those of a run, or with --embeddings those of your own file."""
    own: dict[str, Any] = {
        "codebook_sizes": sizes, "kind": kind, "collisions": collisions, "modalities": modality,
        "tokenizer": tokenizer, "sample_rows": sample_rows, "seed": seed,
    }  # fmt: skip
    of_run = (dataset, data_dir, items, interactions, preset, config, settings)
    given = {name: value for name, value in own.items() if value is not None}
    if embeddings is None:
        if given or append or as_json:
            raise InvalidArgument("embeddings", "a file, which the other options are for", None)
        _run(_resolve(output, *of_run), output, ["tokenize"])
        return
    if any(value is not None for value in of_run):
        raise InvalidArgument(
            "embeddings", "no options of a run beside it", "some", "see plum tokenize --help"
        )
    from plum.pipeline.tokenize_file import append_parquet, tokenize_parquet
    from plum.sid import quality_report

    with _progress() as progress_of:
        if append:
            if given:
                raise InvalidArgument(
                    "append", "no other settings, which are those of the table", sorted(given)
                )
            table = append_parquet(embeddings, output, progress_of=progress_of)
        else:
            of_fit = [name for name in ("codebook_sizes", "kind", "seed") if name in given]
            if tokenizer is not None and of_fit:
                raise InvalidArgument("tokenizer", "no options of a fit beside it", of_fit)
            if sizes is not None:
                given["codebook_sizes"] = _sizes(sizes)
            table = tokenize_parquet(embeddings, output, progress_of=progress_of, **given)
    quality = {"generation": table.generation, **quality_report(table)}
    if as_json:
        print(json.dumps(quality, indent=2))
        return
    _print_quality(str(output), quality)


@app.command()
def append(
    run_dir: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    items: Annotated[Path, typer.Option(help="New items, Parquet or CSV.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder or tar of <item id>.jpg; default: the run's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Gives new items SIDs by a run's frozen tokenizer, so that it recommends them too."""
    from plum.pipeline.append import append_items

    with _progress() as progress_of:
        table = append_items(run_dir, items, images=images, progress_of=progress_of)
    counts = {"generation": table.generation, "items": table.num_items, "sids": table.num_sids}
    if as_json:
        print(json.dumps(counts, indent=2))
        return
    out.print(
        f"{table.num_items:,} items on {table.num_sids:,} SIDs, generation {table.generation}"
    )


@app.command()
def export(
    run_dir: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    as_json: AsJson = False,
) -> None:
    """Writes a run's model, trie and catalog for serving engines: vLLM, or one of your own."""
    from plum.pipeline.export import export_run

    engine = export_run(run_dir, output)
    if as_json:
        print(json.dumps(engine, indent=2))
        return
    out.print(f"model, trie and catalog are in {escape(str(output))}", soft_wrap=True)


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="SID tables, runs, or files of LC-Rec, LETTER, MiniOneRec, OpenOneRec, GRID.",
            metavar="TABLE...",
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Page to write.")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Parquet with item_id and columns of lists of numbers.")
    ] = None,
    items: Annotated[
        Path | None, typer.Option(help="Parquet or CSV with item_id and a column --label.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column that says what an item is.")] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Codes a level of files that do not say, e.g. 256,256,256.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shows the quality of SID tables, side by side: usage, collisions, purity, what is lost."""
    from plum.pipeline.quality import assess, open_table, unique_names, write_quality_page

    if output is not None and output.is_dir():
        raise InvalidArgument("output", "the file of a page", f"the folder {output}")
    codebook_sizes = None if sizes is None else _sizes(sizes)
    sources = [
        open_table(path, embeddings=embeddings, items=items, label=label,
                   codebook_sizes=codebook_sizes)
        for path in paths
    ]  # fmt: skip
    names = unique_names(sources, paths)
    with console.status("measuring"):
        reports = [
            {**assess(source), "name": name} for source, name in zip(sources, names, strict=True)
        ]
    if output is not None:
        write_quality_page(reports, output)
    if as_json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"tables": reports}, indent=2))
    else:
        for quality in reports:
            _print_quality(quality["name"], quality)
    if output is not None:
        _say_page(output)


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgument("sizes", "numbers such as 256,256,256", repr(text)) from None


def _print_quality(title: str, quality: dict[str, Any]) -> None:
    levels = Table("level", "codes", "usage", "perplexity", "dead", title=escape(title))
    for number, level in enumerate(quality["levels"]):
        levels.add_row(
            str(number),
            str(level["size"]),
            f"{level['usage']:.1%}",
            f"{level['perplexity']:.1f}",
            str(level["dead"]),
        )
    out.print(levels)
    out.print(
        f"{quality['num_items']:,} items, unique SIDs {quality['unique_sid_ratio']:.2%}, "
        f"most items on one SID {quality['max_collision']}"
    )


@app.command()
def recommend(
    run_dir: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    history: Annotated[
        str,
        typer.Option(
            help="Item ids, oldest first, separated by commas; one with a comma in quotes."
        ),
    ],
    num_items: Annotated[int, typer.Option("--num-items", "-k", help="How many items.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Recommends items for a history: titles, SIDs and scores."""
    from plum.config import load_config
    from plum.pipeline.recommender import Recommender

    try:
        fields = next(csv.reader([history], skipinitialspace=True), [])
    except csv.Error:
        expected = "item ids in one line, separated by commas"
        raise InvalidArgument("history", expected, repr(history[:80])) from None
    recommender = Recommender.load(run_dir, load_config(run_dir / "config.json"))
    ids = [item.strip() for item in fields if item.strip()]
    found = recommender.recommend(ids, num_items)
    if as_json:
        print(json.dumps([vars(item) for item in found], indent=2, ensure_ascii=False))
        return
    table = Table("", "item", "title", "SID", "score")
    for rank, item in enumerate(found, 1):
        sid = "-".join(map(str, item.sid))
        table.add_row(str(rank), escape(item.item_id), escape(item.title), sid, f"{item.score:.3f}")
    out.print(table)


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
    from plum.data import DATASETS
    from plum.files import read_json

    if output.exists() and not output.is_dir():
        raise InvalidArgument("output", "the folder of a run", f"the file {output}")
    settings = list(settings or [])
    for key, value in (("data_dir", data_dir), ("items", items), ("interactions", interactions)):
        if value is not None:
            settings.append(f"data.{key}={json.dumps(str(value))}")
    saved = output / "config.json"
    base = None
    if saved.exists():
        base = read_json(saved)
        if not (isinstance(base, dict) and {"seed", "data"} <= base.keys()):
            hint = "choose another folder, as a run keeps its own there"
            raise InvalidData(saved, "the configuration of a run", "a file of something else", hint)
    config = resolve_config(preset=preset, dataset=dataset, file=file, settings=settings, base=base)
    # Before it is saved, as the next command would go on with it.
    if config.data.dataset not in DATASETS:
        raise InvalidArgument("dataset", f"one of {', '.join(DATASETS)}", config.data.dataset)
    if (items or interactions) and config.data.dataset != "tables":
        expected = "tables, which --items and --interactions are for"
        raise InvalidArgument("dataset", expected, config.data.dataset, "add --dataset tables")
    return config


def _say_page(path: Path) -> None:
    console.print(f"page: {escape(str(path))}", soft_wrap=True)


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
    out.print(table)


if __name__ == "__main__":
    main()
