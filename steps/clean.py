"""Bound the work folder by age and size: remove the outcomes that were used the longest ago.

    mlflow run . --env-manager local -e clean -P overrides="clean.max_gb=20 clean.dry_run=true"
    python -m steps.clean clean.older_than_days=7

What a registered version was made from stays, unless `clean.registered=true`. What a live run uses
stays in any case: what is being made is locked, and MLflow knows what a run that goes on has used.
The hub's cache is bounded too if it lies in the work folder (HF_HUB_CACHE=<work>/hub).
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from slm.config import Config
from slm.config.common import ROOT
from slm.config.use import Clean
from slm.digests import size_mb
from slm.evaluation.summary import table
from slm.registry.needs import of_live_runs, of_versions
from slm.running.command import entry_point
from slm.running.killed import FOLDER as RUNNING
from slm.running.killed import end_killed
from slm.running.links import inode
from slm.running.summary import note
from slm.running.work import RESULT, work_folder

DAY_S = 86400
HUB = "hub"
KEPT_WITHOUT_A_STEP = ("measure", "environments", "multirun", HUB)


@dataclass(frozen=True)
class Entry:
    """A folder of the work folder, its size, and the days since it was used."""

    folder: str
    gb: float
    unused_days: float


@dataclass(frozen=True)
class Cleaning:
    """What was removed (or would be, in a dry run), and why the rest stays, by folder.

    `freed_gb` is what the disk gets back: less than `removed_gb` if files have other names, in
    MLflow's store say.
    """

    work: str
    dry_run: bool
    removed: list[Entry]
    kept: dict[str, str]
    removed_gb: float
    freed_gb: float
    left_gb: float


def clean(work: Path, settings: Clean) -> Cleaning:
    """Remove what is older than allowed, then the longest unused until the folder is small enough.

    What has to stay stays, even if the folder remains larger than `max_gb`.
    """
    versions = set() if settings.registered else of_versions(work)
    live = of_live_runs()
    entries = sorted(entries_of(work), key=lambda entry: -entry.unused_days)
    left_gb = sum(entry.gb for entry in entries)
    removed: list[Entry] = []
    kept: dict[str, str] = {}
    names: dict[tuple[int, int], int] = {}  # of files, that are left
    freed_gb = 0.0
    for entry in entries:
        folder = work / entry.folder
        is_old = is_above(entry.unused_days, settings.older_than_days)
        if not is_old and not is_above(left_gb, settings.max_gb):
            kept[entry.folder] = "within the bounds"
        elif folder.name.split(".")[0] in live or (folder.parent.name == HUB and works(work)):
            kept[entry.folder] = "a live run uses it"
        elif says(folder, versions):
            kept[entry.folder] = "a registered version was made from it"
        elif (freed := remove(folder, settings.dry_run, names)) is None:
            kept[entry.folder] = "it is being made"
        else:
            removed.append(entry)
            left_gb -= entry.gb
            freed_gb += freed / 1e9
    removed_gb = sum(entry.gb for entry in removed)
    return Cleaning(str(work), settings.dry_run, removed, kept, removed_gb, freed_gb, left_gb)


def entries_of(work: Path) -> Iterator[Entry]:
    """All that steps keep, whole or not; nothing else that may lie in the folder."""
    steps = [path.stem for path in (ROOT / "steps").glob("*.py")]
    for kind in (*steps, *KEPT_WITHOUT_A_STEP):
        for folder in (work / kind).glob("*/"):
            result = folder / RESULT
            used = (result if result.is_file() else folder).stat().st_mtime
            if kind == HUB:
                used = max([path.lstat().st_mtime for path in folder.rglob("*")], default=used)
            name = folder.relative_to(work).as_posix()
            yield Entry(name, size_mb(folder) / 1e3, (time.time() - used) / DAY_S)


def is_above(value: float, bound: float | None) -> bool:
    return bound is not None and value > bound


def says(folder: Path, words: set[str]) -> bool:
    """Whether the outcome in a folder names one of them."""
    result = folder / RESULT
    text = result.read_text() if words and result.is_file() else ""
    return any(word in text for word in words)


def works(work: Path) -> bool:
    """Whether a run of this work folder goes on: it holds the lock of its record."""
    return any(map(is_held, (work / RUNNING).glob("*.lock")))


def is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def remove(folder: Path, dry_run: bool, names: dict[tuple[int, int], int]) -> int | None:
    """Remove an outcome, and say how many bytes that frees; None if a run makes it, and it stays.

    `names` says how many names of files are left, after what was removed before. The lock's file
    stays. result.json goes first, so that what a kill leaves is not taken for whole.
    """
    name = folder.name.split(".")[0]  # what an export left beside its folder has the same lock
    lock = FileLock(folder.with_name(f"{name}.lock"), timeout=0)
    with contextlib.suppress(Timeout), lock:
        freed = 0
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                file, found = inode(path), path.stat()
                names[file] = names.get(file, found.st_nlink) - 1
                freed += 0 if names[file] else found.st_size
        if not dry_run:
            (folder / RESULT).unlink(missing_ok=True)
            shutil.rmtree(folder)
        return freed
    return None


def show(done: Cleaning) -> None:
    """Print what went, and how much stays for which reason."""
    console = Console(width=120, highlight=False)
    columns = {"folder": "left", "GB": "right", "days unused": "right"}
    rows = [[e.folder, f"{e.gb:.3f}", f"{e.unused_days:.1f}"] for e in done.removed]
    words = "Would be removed" if done.dry_run else "Removed"
    if rows:
        console.print(table(words, columns, rows), "")
    for reason in dict.fromkeys(done.kept.values()):
        count = list(done.kept.values()).count(reason)
        console.print(f"kept        {count}: {reason}")
    text = f"{words} {done.removed_gb:.3f} GB; {done.left_gb:.3f} GB stay in {done.work}"
    if done.removed_gb - done.freed_gb >= 0.001:
        text += (
            f". On the disk {done.freed_gb:.3f} GB get free: the other files have names elsewhere"
        )
    console.print(text, soft_wrap=True, markup=False)


def main(config: Config) -> None:
    work = work_folder(config.paths.work)
    if not config.clean.dry_run:
        end_killed(work)
    done = clean(work, config.clean)
    show(done)
    note(result=asdict(done))


if __name__ == "__main__":
    entry_point(main)
