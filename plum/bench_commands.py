"""``plum bench`` and ``plum bench compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(help="Measures this machine beside what people use, and compares two runs.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to keep, for compare.")
    ] = None,
    select: Annotated[
        str | None, typer.Option("--select", "-k", help="Which: words of names, with and, or, not.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Full size, for figures to quote.")] = False,
    as_json: AsJson = False,
) -> None:
    """Runs the benchmarks of this checkout (all: under ten minutes) and prints their table."""
    if context.invoked_subcommand is not None:
        return
    from plum.bench import run_suite, table_of

    results = run_suite(output, select=select, full=full)
    print(json.dumps(results, indent=2) if as_json else table_of(results))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON of the run to hold against.")],
    after: Annotated[Path, typer.Argument(help="JSON of the run in question.")],
    as_json: AsJson = False,
) -> None:
    """Shows what became slower or faster by more than noise; exit status 1 if plum is slower."""
    from plum.bench import compare as compare_runs

    found = compare_runs(before, after)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        out = Console(emoji=False)
        table = Table("benchmark", "before, ms", "after, ms", "ratio", "noise up to", "")
        for each in found.changes:
            if each.verdict != "same":
                times = f"{1e3 * each.before:.4g}", f"{1e3 * each.after:.4g}"
                ratios = f"{each.ratio:.2f}", f"{each.limit:.2f}"
                table.add_row(
                    escape(each.name),
                    *times,
                    *ratios,
                    f"peer {each.verdict}" if each.peer else each.verdict,
                )
        if table.row_count:
            out.print(table)
        same = sum(each.verdict == "same" for each in found.changes)
        out.print(
            f"{same} of {len(found.changes)} benchmarks are the same within noise,"
            f" {len(found.regressions)} of plum are slower"
        )
        if found.peer_ratio is not None:
            out.print(
                f"{found.peers} peers took {found.peer_ratio:.2f} times as long at the median;"
                f" most stay within {found.peer_spread:.2f} of that"
            )
        if found.missing:
            lost = f"{len(found.missing)} benchmarks of {before} are not in {after}"
            out.print(escape(lost), soft_wrap=True)
        for warning in found.warnings:
            out.print(f"[yellow]warning:[/] {escape(warning)}")
    if found.regressions:
        raise typer.Exit(1)
