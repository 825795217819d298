"""The work folder: outcomes by content, made once and reused.

Each outcome has a folder `<work>/<kind>/<key>/`. Its result.json is written last: if it is there,
the outcome is whole.
"""

import ast
import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from filelock import FileLock

from slm.config import ROOT, user_cache
from slm.digests import digest_file, digest_files, digest_of
from slm.records import from_json

log = logging.getLogger("slm.work")

# Modules that shape how a step is run, but not its outcome: a change to them makes nothing anew.
APART_FROM_OUTCOMES = ("slm.config", "slm.errors", "slm.records", "slm.redaction", "slm.running")


class Outcome(Protocol):
    """A frozen dataclass; `uri` is what the next step takes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def uri(self) -> str: ...


T = TypeVar("T", bound=Outcome)


class NotKept(Exception):
    """The outcome is not there, and was asked for only if it is."""


@dataclasses.dataclass(frozen=True)
class Kept(Generic[T]):
    """An outcome in its folder, and whether it was there already."""

    outcome: T
    folder: Path
    key: str
    reused: bool


def keep(
    kind: str,
    work: str,
    outcome: type[T],
    *,
    key: dict[str, Any],
    module: str,
    make: Callable[[Path], T],
    still_there: Callable[[T], bool] = lambda _: True,
    again: bool = False,
    only_kept: bool = False,
) -> Kept[T]:
    """Make an outcome in `<work>/<kind>/<key>/`, or reuse the one that is there.

    `key` names everything that shapes the outcome besides the code of `module`. An outcome is
    reused if its result.json stands, every file in the folder has the digest that it lists, it is
    `still_there`, and it is not asked for `again`. One process at a time makes it; others wait.
    NotKept if it would have to be made, and `only_kept`.
    """
    digest = digest_of({"kind": kind, "key": key, "code": code_digests(module)})
    folder = work_folder(work) / kind / digest[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        result = None if again else read_result(folder, outcome)
        if result is not None and still_there(result):
            return Kept(result, folder, digest[:16], reused=True)
        if only_kept:
            raise NotKept(str(folder))
        log.info("%s: started, in %s", kind, folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            result = make(folder)
            write_result(folder, result, digest)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return Kept(result, folder, digest[:16], reused=False)


def work_folder(work: str) -> Path:
    """`paths.work`; a relative one starts at the project."""
    return ROOT / Path(work).expanduser()


def clean() -> None:
    """Remove the outcomes in the default work folder, and nothing else that may lie there."""
    work = work_folder(os.environ.get("SLM_WORK") or user_cache())
    steps = [path.stem for path in (ROOT / "steps").glob("*.py")]
    for kind in (*steps, "measure", "environments", "multirun"):
        shutil.rmtree(work / kind, ignore_errors=True)
    print(f"removed the outcomes of steps in {work}")


def read_result(folder: Path, outcome: type[T]) -> T | None:
    """The outcome that a folder holds, unless one of its files changed since."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        recorded = json.loads(path.read_text())
        result, digests = from_json(outcome, recorded["outcome"]), recorded["sha256"]
    except (ValueError, TypeError, KeyError):
        log.info("%s cannot be read: made anew", path)
        return None
    found = {name: digest for name, digest in digest_files(folder).items() if name != path.name}
    if found != digests:
        log.info("%s changed since it was made: made anew", folder)
        return None
    return result


def write_result(folder: Path, result: Outcome, digest: str) -> None:
    """Write result.json in one motion."""
    record = {
        "key": digest,
        "made": time.time(),
        "outcome": dataclasses.asdict(result),
        "sha256": digest_files(folder),
    }
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(record, indent=2, default=enum_value) + "\n")
    partial.replace(folder / "result.json")


def enum_value(value: Any) -> Any:
    """JSON's `default` for what a record may hold besides JSON's own types: enums."""
    return value.value


def code_digests(module: str) -> dict[str, str]:
    """SHA-256 of a module's file and of all project modules that it imports, and their templates.

    Follows `import` statements anywhere in the files. What decides only how a step is run is left
    out (APART_FROM_OUTCOMES).
    """
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = module_path(name)
        if path is None or name in files or name.startswith(APART_FROM_OUTCOMES):
            continue
        files[name] = path
        waiting += imported_names(name, path)
    templates = {template for path in files.values() for template in path.parent.glob("*.j2")}
    every = sorted({*files.values(), *templates})
    return {path.relative_to(ROOT).as_posix(): digest_file(path) for path in every}


def module_path(name: str) -> Path | None:
    """The file of a project module; None if it is not the project's, or no module."""
    base = ROOT.joinpath(*name.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def imported_names(name: str, path: Path) -> Iterator[str]:
    """The modules that a file may import, by absolute name; some may not exist."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of the libraries that shape an outcome."""
    return {package: importlib.metadata.version(package) for package in packages}
