"""Files that are there whole or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one motion; a kill leaves at most `partial_of` it."""
    with in_one_motion(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def in_one_motion(path: Path) -> Iterator[Path]:
    """Where to write what then becomes a file in one motion."""
    partial = partial_of(path)
    yield partial
    partial.replace(path)


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
