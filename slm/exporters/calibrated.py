"""Find a graph's weight among those that calibration rounded.

Makers of graphs name, fuse and split weights as they like, so a weight is found by what it holds:
each of its rows has to be a row of the checkpoint's own, to the bit.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.errors import StepError
from slm.exporters.calibration import HEAD, Saved
from slm.exporters.decoder import Tensors
from slm.exporters.graph import Packed
from slm.sources.weights import layer_of


@dataclass(frozen=True)
class Calibrated:
    """The quantizer of a graph whose checkpoint was calibrated into `folder`, on `read` tokens."""

    checkpoint: Path
    folder: Path
    block_size: int
    accuracy_level: int = 0
    read: int = 0

    def quantize(self, name: str, weight: np.ndarray, looked_up: bool = False) -> list[Packed]:
        """The rounded rows of a weight [outputs, inputs]. Raises StepError if one is unknown."""
        saved = Saved(self.folder / f"{layer_of(name) or HEAD}.safetensors", self.block_size)
        wanted = np.ascontiguousarray(weight)
        tensors = Tensors(self.checkpoint)
        linears = saved.names()
        rows = {linear: tensors.rows(f"{linear}.weight", wanted) for linear in linears}
        linears.sort(key=lambda linear: -(rows[linear] >= 0).sum())
        owner, row = np.full(len(wanted), -1), np.full(len(wanted), -1)
        for number, linear in enumerate(linears):
            new = (owner < 0) & (rows[linear] >= 0)
            owner[new], row[new] = number, rows[linear][new]
        if (owner < 0).any():
            raise StepError(
                f"{(owner < 0).sum()} of {len(owner)} rows of the graph's {name} are in none of "
                "the linears that were calibrated: the maker of the graph changed them, or they "
                "are of another kind of module. Export with target.quantizer=rtn."
            )
        parts: list[Packed] = []
        bounds = [0, *(np.flatnonzero(np.diff(owner)) + 1), len(owner)]
        for start, stop in itertools.pairwise(bounds):
            rounded = saved[linears[owner[start]]]
            own = row[start:stop]
            part = rounded.packed[own], rounded.scales[own]
            if parts and parts[-1][0].shape[2] == part[0].shape[2]:
                before = parts.pop()
                part = np.concatenate([before[0], part[0]]), np.concatenate([before[1], part[1]])
            parts.append(part)
        return parts
