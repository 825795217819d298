"""The work folder: outcomes by content, made once and reused.

Each outcome has a folder `<work>/<kind>/<key>/`. Its result.json is written last: if it is there,
the outcome is whole.
"""

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from filelock import FileLock, Timeout

from slm.config.common import ROOT
from slm.digests import digest_file, digest_files, digest_of
from slm.records import from_json
from slm.running.memory import peak_with_children_mb
from slm.running.whole import write_whole

log = logging.getLogger("slm.work")

RESULT = "result.json"
DIGEST = 64  # characters of a SHA-256: what is as long is not shown, what is longer not kept

# Modules that shape how a step is run, but not its outcome: a change to them makes nothing anew.
APART_FROM_OUTCOMES = (
    "slm.config",
    "slm.errors",
    "slm.planning",
    "slm.records",
    "slm.redaction",
    "slm.running",
)


class Outcome(Protocol):
    """A frozen dataclass; `uri` is what the next step takes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def uri(self) -> str: ...


T = TypeVar("T", bound=Outcome)


class NotKept(Exception):
    """The outcome is not there to be reused; the message says why."""


@dataclasses.dataclass(frozen=True)
class Kept(Generic[T]):
    """An outcome in its folder; `why` says why it was made, "" if it was there already."""

    outcome: T
    folder: Path
    key: str
    why: str = ""

    @property
    def reused(self) -> bool:
        return not self.why


def keep(
    kind: str,
    work: str,
    outcome: type[T],
    *,
    key: dict[str, Any],
    module: str,
    make: Callable[[Path], T],
    stale: Callable[[T], str] = lambda _: "",
    of: dict[str, str] | None = None,
    again: bool = False,
    only_kept: bool = False,
) -> Kept[T]:
    """Make an outcome in `<work>/<kind>/<key>/`, or reuse the one that is there.

    `key` names everything that shapes the outcome besides the code of `module`. An outcome is
    reused if its result.json stands, every file in the folder has the digest that it lists, it is
    not asked for `again`, and not `stale`, which says in words what makes it so, "" for nothing.
    One process at a time makes it; others wait. `of` says for readers what it is an outcome of.
    With `only_kept`, nothing is written, and an outcome that would have to be made is NotKept.
    """
    code = code_digests(module)
    digest = digest_of({"kind": kind, "key": key, "code": code})
    folder = work_folder(work) / kind / digest[:16]
    parts, of = parts_of({**key, "code": code}), of or {}

    def reuse() -> Kept[T]:
        if again:
            raise NotKept("asked for again")
        if not (folder / RESULT).is_file():
            raise NotKept(difference(folder.parent, parts, of))
        result = read_result(folder, outcome)
        if why := stale(result):
            raise NotKept(why)
        return Kept(result, folder, digest[:16])

    if only_kept:
        return reuse()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            kept = reuse()
            touch(kept.folder)
            return kept
        except NotKept as reason:
            why = str(reason)
        log.info("%s: started, in %s: %s", kind, folder, why)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        start = time.monotonic()
        try:
            with scratch(folder):
                result = make(folder)
            record = {"key": digest, "made": time.time(), "of": of, "parts": parts}
            record |= {"made_s": time.monotonic() - start, "peak_rss_mb": peak_with_children_mb()}
            write_result(folder, result, record)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return Kept(result, folder, digest[:16], why)


@contextlib.contextmanager
def locked(folder: Path, said: Callable[[str], None] = log.info) -> Iterator[None]:
    """Have a folder to oneself, and say so if one has to wait; a dead process holds no lock."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said(f"another run makes {folder}: waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Temporary files beside a folder, where the next run finds what a killed one left."""
    place = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(place)
    try:
        yield
    finally:
        tempfile.tempdir = before[0]
        os.environ.pop("TMPDIR")
        os.environ.update({"TMPDIR": before[1]} if before[1] else {})
        shutil.rmtree(place, ignore_errors=True)


def work_folder(work: str) -> Path:
    """`paths.work`; a relative one starts at the project."""
    return ROOT / Path(work).expanduser()


def touch(folder: Path) -> None:
    """Note that an outcome was used: `clean` removes the longest unused first."""
    with contextlib.suppress(OSError):  # of another user
        os.utime(folder / RESULT)


def read_result(folder: Path, outcome: type[T]) -> T:
    """The outcome that a folder holds; NotKept if one of its files changed since."""
    try:
        recorded = json.loads((folder / RESULT).read_text())
        result, digests = from_json(outcome, recorded["outcome"]), recorded["sha256"]
        found = {name: digest for name, digest in digest_files(folder).items() if name != RESULT}
    except (ValueError, TypeError, KeyError) as error:
        raise NotKept(f"{folder / RESULT} cannot be read") from error
    except FileNotFoundError as error:  # another run is making it
        raise NotKept(f"{folder} is being made anew") from error
    if found != digests:
        raise NotKept(f"{folder} changed since it was made")
    return result


def write_result(folder: Path, result: Outcome, record: dict[str, Any]) -> None:
    """Write result.json in one motion."""
    record |= {"outcome": dataclasses.asdict(result), "sha256": digest_files(folder)}
    write_whole(folder / RESULT, json.dumps(record, indent=2, default=enum_value) + "\n")


def records(kind: Path) -> list[dict[str, Any]]:
    """What the outcomes of a kind say of themselves, each with its folder; none that is broken."""
    found = []
    for path in kind.glob(f"*/{RESULT}"):
        with contextlib.suppress(OSError, ValueError):
            found.append({**json.loads(path.read_text()), "folder": path.parent})
    return found


def parts_of(key: Any, prefix: str = "") -> dict[str, Any]:
    """What a key is made of, by dotted name: numbers and short texts, digests of all else."""
    if isinstance(key, dict) and key:
        named = [(f"{prefix}.{name}" if prefix else str(name), v) for name, v in key.items()]
        return {part: value for name, v in named for part, value in parts_of(v, name).items()}
    value = json.loads(json.dumps(key, default=lambda v: getattr(v, "value", str(v))))
    return {prefix: value if len(str(value)) <= DIGEST else digest_of(value)}


def difference(kind: Path, parts: dict[str, Any], of: dict[str, str], most: int = 3) -> str:
    """In words, in what a key differs from that of the nearest outcome of its kind."""

    def differing(record: dict[str, Any]) -> list[str]:
        others = record["parts"]
        return [n for n in {**others, **parts} if others.get(n) != parts.get(n)]

    def distance(record: dict[str, Any]) -> tuple[bool, int, float]:
        return record["of"] != of, len(differing(record)), -record["made"]

    nearest = min((r for r in records(kind) if "parts" in r), key=distance, default=None)
    if nearest is None or nearest["of"].get("model") != of.get("model"):
        return f"never made of {of['model']}" if of else "never made"
    words = [changed(n, nearest["parts"].get(n), parts.get(n)) for n in differing(nearest)]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more


def changed(name: str, before: Any, now: Any) -> str:
    """One difference in words."""
    if name.startswith("code."):
        return f"{name.removeprefix('code.')} changed"
    if len(str(before)) == DIGEST or len(str(now)) == DIGEST:
        return f"{name} changed"
    return f"{name}: {'none' if before is None else before} → {'none' if now is None else now}"


def enum_value(value: Any) -> Any:
    """JSON's `default` for what a record may hold besides JSON's own types: enums."""
    return value.value


def code_digests(module: str) -> dict[str, str]:
    """SHA-256 of a module's file, of all project modules that it imports, and of their templates.

    A template is that of the modules in its folder that name it. Follows `import` statements
    anywhere in the files. What decides only how a step is run is left out (APART_FROM_OUTCOMES).
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
    templates = {
        template
        for path in files.values()
        for template in path.parent.glob("*.j2")
        if template.name in path.read_text()
    }
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
