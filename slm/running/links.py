"""Hard links in the place of copies: gigabytes of weights lie on a disk once."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm.running.patched import patched

LARGE = 2**20  # bytes: smaller files are copied, for people edit them in place


@contextlib.contextmanager
def copies_as_links(files: Path, work: Path) -> Iterator[None]:
    """Let copies of the large files of a folder be hard links, if the folder is in `work`.

    MLflow 3.17 copies a model's files into a temporary folder, and from there into the store. On
    another file system, or one without hard links, a file is copied, once. Outside of `work` a file
    is its owner's, who may write into it.
    """
    own = files.resolve().is_relative_to(work.resolve())
    found = files.rglob("*") if own else ()
    paths = [path for path in found if path.is_file() and not path.is_symlink()]
    places = {inode(path): [path] for path in paths if path.stat().st_size >= LARGE}
    copy = shutil.copyfile

    def link_or_copy(source: Any, destination: Any, *, follow_symlinks: bool = True) -> Any:
        same = places.get(inode(source), [])
        for place in same:
            with contextlib.suppress(OSError):
                os.link(place, destination)
                return destination
        copy(source, destination, follow_symlinks=follow_symlinks)
        same.append(Path(destination))
        return destination

    with patched(shutil, "copyfile", link_or_copy):
        yield


def inode(path: Any) -> tuple[int, int]:
    """What all names of one file have in common."""
    found = os.stat(path)
    return found.st_dev, found.st_ino
