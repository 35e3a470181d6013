"""A stage: files in, files out, a manifest last; skipped when nothing it reads has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plum
from plum.errors import InvalidArgument, InvalidData
from plum.files import read_json, sha256, write_json

Progress = Callable[[int, int], None]
# What a stage has begun with, in the folder of its try.
_STARTED = "started.json"


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
        neutral: Settings that its outputs do not depend on.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Workspace], None]
    sources: Callable[[Any], list[Path]] = lambda settings: []
    version: int = 1
    optional: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()

    def fingerprint(self, run_dir: Path, settings: Any, seed: int) -> str:
        """Returns a digest of everything the outputs depend on.

        Raises:
            InvalidData: an input stage has not been run, or from inputs that have changed since.
        """
        inputs = {}
        for name in self.inputs:
            manifest = read_manifest(run_dir, name)
            if manifest is None:
                raise InvalidData(
                    run_dir / name,
                    f"the outputs of stage {name!r}, which stage {self.name!r} reads",
                    "no manifest",
                    f"run: plum {name} --output {run_dir}",
                )
            inputs[name] = manifest["outputs"]
        for name in self.optional:
            manifest = read_manifest(run_dir, name)
            if manifest is not None and manifest["outputs"]:
                inputs[name] = manifest["outputs"]
        check_inputs(run_dir, inputs)
        for source in self.sources(settings):
            status = source.stat()
            inputs[str(source.resolve())] = [status.st_size, status.st_mtime_ns]
        counting = {k: v for k, v in _plain(settings).items() if k not in self.neutral}
        what = [self.name, self.version, counting, seed, inputs]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def is_current(self, run_dir: Path, fingerprint: str) -> bool:
        """Tells whether the folder holds whole outputs of this very work."""
        manifest = read_manifest(run_dir, self.name)
        if manifest is None or manifest.get("fingerprint") != fingerprint:
            return False
        return all(
            (run_dir / self.name / name).is_file()
            and (run_dir / self.name / name).stat().st_size == output["bytes"]
            for name, output in manifest["outputs"].items()
        )

    def check_folders(self, run_dir: Path) -> None:
        """Checks that what a run of the stage would replace is its own.

        Raises:
            InvalidArgument: a folder that it writes to holds files that no stage has put there.
        """
        final, partial = _folders(run_dir, self.name)
        if _is_mark(partial / "manifest.json"):
            return  # Whole outputs, which a kill has kept from taking their place.
        for folder, mark in ((final, "manifest.json"), (partial, _STARTED)):
            if not _is_mark(folder / mark) and _holds_files(folder):
                raise InvalidArgument(
                    "output",
                    f"a folder whose {folder.name}/ is empty or was written by plum",
                    f"files of others in {folder}",
                    "take another folder",
                )

    def execute(self, run_dir: Path, settings: Any, seed: int, progress: Progress) -> bool:
        """Runs the stage unless its outputs are current; returns whether it ran.

        The work is done in ``<name>.partial``, which an interrupted try leaves behind and the
        next one continues; earlier outputs stay in place until the new ones are whole.
        """
        self.check_folders(run_dir)
        final, partial = _folders(run_dir, self.name)
        _finish_swap(final, partial)
        fingerprint = self.fingerprint(run_dir, settings, seed)
        digests = _digests(run_dir, (*self.inputs, *self.optional))
        if self.is_current(run_dir, fingerprint):
            manifest = read_manifest(run_dir, self.name) or {}
            if "inputs" not in manifest:
                # Of an older version; that the fingerprint is the same says what they were.
                write_json(final / "manifest.json", {**manifest, "inputs": digests})
            return False
        started = partial / _STARTED
        if partial.exists() and _content(started).get("fingerprint") != fingerprint:
            _clear(partial)
        write_json(started, {"fingerprint": fingerprint})
        begin = time.monotonic()
        self.run(Workspace(run_dir, partial, settings, seed, progress))
        outputs = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path != started
        }
        manifest = {
            "stage": self.name,
            "fingerprint": fingerprint,
            "plum": plum.__version__,
            "settings": _plain(settings),
            "seed": seed,
            "seconds": round(time.monotonic() - begin, 3),
            "inputs": digests,
            "outputs": outputs,
        }
        write_json(partial / "manifest.json", manifest)
        _finish_swap(final, partial)
        return True


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(settings.model_dump_json()) if settings is not None else {}


def read_manifest(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """Returns the manifest of a stage, or None where it has none that is whole."""
    content = _content(run_dir / stage / "manifest.json")
    return content if {"fingerprint", "outputs", "settings", "seed"} <= set(content) else None


def check_inputs(run_dir: Path, stages: Iterable[str]) -> None:
    """Checks that stages were made from what the stages before them hold now.

    Raises:
        InvalidData: one of them that was run has no manifest or one of an older version, or an
            input of it has been made anew since.
    """
    hint = f"run: plum run --output {run_dir}"
    for name in stages:
        if not (run_dir / name).exists():
            continue
        manifest = read_manifest(run_dir, name)
        if manifest is None:
            raise InvalidData(run_dir / name, "outputs with a manifest", "no manifest", hint)
        if "inputs" not in manifest:
            expected = "outputs that say what they were made from"
            raise InvalidData(run_dir / name, expected, "those of an older version of plum", hint)
        now = _digests(run_dir, manifest["inputs"])
        for source, digest in manifest["inputs"].items():
            if now.get(source) != digest:
                raise InvalidData(
                    run_dir / name,
                    f"outputs made from the {source}/ beside it",
                    "those of an earlier one",
                    hint,
                )


def is_stale(run_dir: Path, stage: str) -> bool:
    """Tells whether a stage was made from outputs that have been made anew since."""
    inputs = (read_manifest(run_dir, stage) or {}).get("inputs", {})
    return inputs != _digests(run_dir, inputs)


def _content(path: Path) -> dict[str, Any]:
    """Returns what a manifest says; nothing where it is absent or damaged."""
    try:
        content = read_json(path)
    except InvalidData:
        return {}
    return content if isinstance(content, dict) else {}


def _is_mark(path: Path) -> bool:
    """Tells whether a file is a manifest of ours, and not that of another tool."""
    return path.is_file() and "fingerprint" in _content(path)


def _holds_files(folder: Path) -> bool:
    """Tells whether a folder holds more than a try that was killed at once has left."""
    unfinished = f".{Path(_STARTED).stem}."
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return folder.is_file() or any(not path.name.startswith(unfinished) for path in files)


def _clear(partial: Path) -> None:
    """Empties the folder of a try but for its mark, so that a kill leaves no folder without."""
    for path in partial.iterdir():
        if path.name == _STARTED:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _digests(run_dir: Path, stages: Iterable[str]) -> dict[str, str]:
    """Returns a digest of the outputs of each stage that has some."""
    found = {}
    for name in stages:
        manifest = read_manifest(run_dir, name)
        if manifest is not None and manifest["outputs"]:
            outputs = json.dumps(manifest["outputs"], sort_keys=True)
            found[name] = hashlib.sha256(outputs.encode()).hexdigest()
    return found


def _folders(run_dir: Path, stage: str) -> tuple[Path, Path]:
    """Returns where outputs end up, and where they are made."""
    return run_dir / stage, run_dir / f"{stage}.partial"


def _finish_swap(final: Path, partial: Path) -> None:
    """Puts whole outputs in place of the earlier ones; safe to be cut off anywhere and repeated."""
    if not (partial / "manifest.json").exists():
        return
    (partial / _STARTED).unlink(missing_ok=True)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
