"""A stage: files in, files out, a manifest last; skipped when nothing it reads has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plum
from plum.errors import InvalidData
from plum.files import read_json, sha256, write_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workspace:
    """What a stage works with.

    Attributes:
        run_dir: Folder of the run.
        folder: Folder this stage writes to; what an interrupted try left is still in it.
        settings: The stage's section of the configuration.
        seed: Seed of the run.
        progress: Call as ``progress(done, total)``.
    """

    run_dir: Path
    folder: Path
    settings: Any
    seed: int
    progress: Progress

    def input(self, stage: str) -> Path:
        """Returns the folder of an earlier stage."""
        return self.run_dir / stage


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: Name of the stage, of its folder and of its section of the configuration.
        inputs: Stages whose outputs it reads.
        run: Does the work.
        sources: Names the files outside the run that it reads, given its settings.
        version: Raised when the work changes, so that old outputs are not taken for new ones.
        optional: Stages whose outputs it reads where there are any.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Workspace], None]
    sources: Callable[[Any], list[Path]] = lambda settings: []
    version: int = 1
    optional: tuple[str, ...] = ()

    def fingerprint(self, run_dir: Path, settings: Any, seed: int) -> str:
        """Returns a digest of everything the outputs depend on.

        Raises:
            InvalidData: an input stage has not been run.
        """
        inputs = {}
        for name in self.inputs:
            manifest = run_dir / name / "manifest.json"
            if not manifest.exists():
                raise InvalidData(
                    run_dir / name,
                    f"the outputs of stage {name!r}, which stage {self.name!r} reads",
                    "no manifest",
                    f"run: plum {name} --output {run_dir}",
                )
            inputs[name] = read_json(manifest)["outputs"]
        for name in self.optional:
            manifest = run_dir / name / "manifest.json"
            if manifest.exists() and (outputs := read_json(manifest)["outputs"]):
                inputs[name] = outputs
        for source in self.sources(settings):
            status = source.stat()
            inputs[str(source.resolve())] = [status.st_size, status.st_mtime_ns]
        what = [self.name, self.version, _plain(settings), seed, inputs]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def is_current(self, run_dir: Path, fingerprint: str) -> bool:
        """Tells whether the folder holds whole outputs of this very work."""
        manifest = run_dir / self.name / "manifest.json"
        if not manifest.exists():
            return False
        content = read_json(manifest)
        return content["fingerprint"] == fingerprint and all(
            (run_dir / self.name / name).is_file()
            and (run_dir / self.name / name).stat().st_size == output["bytes"]
            for name, output in content["outputs"].items()
        )

    def execute(self, run_dir: Path, settings: Any, seed: int, progress: Progress) -> bool:
        """Runs the stage unless its outputs are current; returns whether it ran.

        The work is done in ``<name>.partial``, which an interrupted try leaves behind and the
        next one continues; earlier outputs stay in place until the new ones are whole.
        """
        final, partial = run_dir / self.name, run_dir / f"{self.name}.partial"
        _finish_swap(final, partial)
        fingerprint = self.fingerprint(run_dir, settings, seed)
        if self.is_current(run_dir, fingerprint):
            return False
        started = partial / "started.json"
        if partial.exists() and not (
            started.exists() and read_json(started)["fingerprint"] == fingerprint
        ):
            shutil.rmtree(partial)
        write_json(started, {"fingerprint": fingerprint})
        begin = time.monotonic()
        self.run(Workspace(run_dir, partial, settings, seed, progress))
        started.unlink()
        outputs = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "stage": self.name,
            "fingerprint": fingerprint,
            "plum": plum.__version__,
            "settings": _plain(settings),
            "seed": seed,
            "seconds": round(time.monotonic() - begin, 3),
            "outputs": outputs,
        }
        write_json(partial / "manifest.json", manifest)
        _finish_swap(final, partial)
        return True


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(settings.model_dump_json()) if settings is not None else {}


def _finish_swap(final: Path, partial: Path) -> None:
    """Puts whole outputs in place of the earlier ones; safe to be cut off anywhere and repeated."""
    if not (partial / "manifest.json").exists():
        return
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
