"""Runs stages in order into one folder and ends with a table and a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plum.config import Config
from plum.errors import InvalidArgument, InvalidData
from plum.files import locked, read_json, write_json, write_text
from plum.pipeline.html_report import write_html_report
from plum.pipeline.stage import Progress
from plum.pipeline.stages import STAGES


@dataclass(frozen=True)
class Outcome:
    """What became of one stage.

    Attributes:
        stage: Its name.
        ran: False when its outputs were current and it was skipped.
        seconds: How long it took, in this call.
    """

    stage: str
    ran: bool
    seconds: float


def run_stages(
    config: Config,
    run_dir: Path,
    names: Sequence[str],
    *,
    progress_of: Callable[[str], Progress],
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs the named stages in the order given; each is skipped when nothing it reads changed.

    Args:
        config: The resolved configuration; saved as ``config.json`` in the run.
        run_dir: Folder of the run; created when it is not there.
        names: Stages, see :data:`plum.pipeline.stages.STAGES`.
        progress_of: Gives a stage its progress callback.
        on_done: Called after every stage.

    Raises:
        InvalidArgument: the folder holds files of others where a stage would write.
        InvalidData: another process works on the run.
        PlumError: a stage cannot do its work; what earlier stages wrote stays.
    """
    stages = [STAGES[name] for name in names]
    for stage in stages:
        stage.check_folders(run_dir)
    if not (run_dir / "config.json").exists():
        # The last is that of a table made from a file, which takes no more items once it is a run.
        for name in ("metrics.json", "report.html", "tokenize.json"):
            if (run_dir / name).exists():
                expected = f"the folder of a run, or one without a {name}"
                raise InvalidArgument("output", expected, f"{run_dir}", "take another folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with locked(run_dir):
        write_text(run_dir / "config.json", config.model_dump_json(indent=2) + "\n")
        for stage in stages:
            begin = time.monotonic()
            settings: Any = getattr(config, stage.name, None)
            ran = stage.execute(run_dir, settings, config.seed, progress_of(stage.name))
            outcomes.append(Outcome(stage.name, ran, time.monotonic() - begin))
            on_done(outcomes[-1])
    return outcomes


def finish(run_dir: Path) -> dict[str, dict[str, float]]:
    """Writes ``metrics.json`` and ``report.html`` of a run whose stages are all done.

    Returns:
        The metrics of the generator and of each baseline.

    Raises:
        InvalidData: the run is not evaluated, or another process works on it.
    """
    path = run_dir / "evaluate" / "metrics.json"
    if not path.exists():
        raise InvalidData(run_dir, "an evaluated run", "no evaluate/metrics.json", "run: plum run")
    with locked(run_dir):
        metrics = read_json(path)
        write_json(run_dir / "metrics.json", metrics)
        write_html_report(run_dir)
    return metrics
