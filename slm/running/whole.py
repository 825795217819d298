"""Files that are there whole or not at all."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one motion; a kill leaves at most `partial_of` it."""
    partial = partial_of(path)
    partial.write_text(text)
    partial.replace(path)


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
