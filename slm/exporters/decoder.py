"""A checkpoint's decoder and a text: of its layers, one is in memory at a time.

transformers' own modules run, on the meta device but for what is filled from the checkpoint's
files, which are mapped into memory.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from slm.errors import StepError
from slm.sources.weights import weight_files

Call = Callable[[nn.Module, torch.Tensor], Any]


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let torch round factors to bfloat16 where the CPU multiplies these faster (AMX, AVX-512).

    Sums stay float32. A product is off by 0.2 %, and rounding a weight to int4 moves it by 5 to 10.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Tensors:
    """A checkpoint's tensors by name, in float32, read when they are asked for."""

    def __init__(self, checkpoint: Path) -> None:
        self.files: dict[str, Any] = {}
        for path in weight_files(checkpoint, str(checkpoint)):
            file = safe_open(path, "pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise StepError(
                f"the checkpoint has no tensor {name}, which transformers' model has: calibration "
                "cannot run it. Export with target.quantizer=rtn."
            )
        tensor = self.files[name].get_tensor(name).float()
        if not tensor.isfinite().all():
            raise StepError(f"{name} holds NaN or infinity: the checkpoint is damaged.")
        return tensor

    def rows(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """For each row of `wanted`, the number of the tensor's equal row, or -1.

        Of several equal rows it is the one that comes next, as in the tensor itself.
        """
        own = self[name].numpy().astype(wanted.dtype)
        if own.shape[1] != wanted.shape[1]:
            return np.full(len(wanted), -1)
        numbers: dict[int, list[int]] = {}
        for number, row in enumerate(own):
            numbers.setdefault(hash(row.tobytes()), []).append(number)
        found, last = np.full(len(wanted), -1), -1
        for i, row in enumerate(wanted):
            if equal := numbers.get(hash(row.tobytes())):
                last = found[i] = equal[bisect.bisect_right(equal, last) % len(equal)]
        found[(own[found] != wanted).any(1)] = -1
        return found

    def fill(self, module: nn.Module, prefix: str, apart_from: str = "\0") -> None:
        """Give a module on the meta device its weights."""
        names = [name for name in module.state_dict() if not name.startswith(apart_from)]
        own = {name: self[f"{prefix}.{name}"] for name in names}
        module.load_state_dict(own, strict=False, assign=True)


def empty_model(checkpoint: Path) -> Any:
    """transformers' model on the meta device. Raises StepError if it is no decoder of layers."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    inner = model.get_decoder()
    if not hasattr(inner, "layers") or not hasattr(inner, "norm"):
        raise StepError(
            f"calibration needs a decoder of layers and a final norm, and {type(inner).__name__} "
            "has other names for them. Export with target.quantizer=rtn."
        )
    return model


def require_linears(model: Any) -> None:
    """Raise StepError if layers multiply by stacked matrices, as experts do: none is a linear."""
    for name, module in model.get_decoder().layers.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and not isinstance(module, nn.Conv1d):
                raise StepError(
                    f"layers.{name}.{parameter} is a stack of {len(weight)} matrices, and "
                    "calibration rounds linears alone. Export with target.quantizer=rtn."
                )


def linears_of_model(model: Any) -> dict[str, nn.Linear]:
    """The layers' linears and the head, by name."""
    head, layers = model.get_output_embeddings(), model.get_decoder().layers
    wanted = {head, *layers.modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m in wanted}


class Decoder:
    """A checkpoint's layers, embedding, final norm and head, and windows of a text's tokens.

    `calls` run its layers as the model does, `name_of` has the names of its modules, and `linears`
    are those that are rounded.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Path, windows: list[list[int]]) -> None:
        self.model = model = empty_model(checkpoint)
        self.name_of = {module: name for name, module in model.named_modules()}
        self.linears = linears_of_model(model)
        self.tensors = Tensors(checkpoint)
        self.inner = model.get_decoder()
        self.layers: nn.ModuleList = self.inner.layers
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tied = bool(model.config.tie_word_embeddings)
        self.tensors.fill(self.inner, self.name_of[self.inner], apart_from="layers.")
        self.windows = torch.tensor(windows)[:, None]
        self.calls = calls_of_layers(self.inner, self.layers, self.windows[0])

    def embedded(self) -> list[torch.Tensor]:
        """What the model gives its first layer for each window."""
        return first_inputs(self.inner, self.layers, self.windows)

    @contextlib.contextmanager
    def filled(self, layer: nn.Module) -> Iterator[None]:
        """With a layer's weights in memory."""
        self.tensors.fill(layer, self.name_of[layer])
        yield
        layer.to("meta")

    def fill_head(self) -> None:
        """Read the head's weight, which is the embedding's if they are tied."""
        if self.tied:
            self.head.weight = self.embedding.weight
        else:
            self.tensors.fill(self.head, self.name_of[self.head])

    def predict(self, _: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of the last layer's output: by the norm, the head, and what follows the head.

        Some models scale their logits or cap them. Called as a layer is.
        """
        normed = BaseModelOutputWithPast(last_hidden_state=self.inner.norm(hidden))
        self.inner.forward = lambda *_, **__: normed
        try:
            logits: torch.Tensor = self.model(input_ids=self.windows[0]).logits
        finally:
            del self.inner.forward
        return logits


def calls_of_layers(inner: Any, layers: nn.ModuleList, window: torch.Tensor) -> list[Call]:
    """How the model calls each of its layers: with which masks and positions."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((args, kwargs))
        return hidden

    for layer in layers:
        layer.forward = record  # type: ignore[assignment]
    inner(window, use_cache=False)
    for layer in layers:
        del layer.forward

    def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return lambda layer, hidden: layer(hidden, *args, **kwargs)

    return [call_of(*each) for each in seen]


class Reached(Exception):
    """What was wanted of a pass through a layer is there."""


def first_inputs(inner: Any, layers: nn.ModuleList, windows: torch.Tensor) -> list[torch.Tensor]:
    """What the model gives its first layer for each window."""
    found: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise Reached

    hook = layers[0].register_forward_pre_hook(stop)
    for window in windows:
        with contextlib.suppress(Reached):
            inner(window, use_cache=False)
    hook.remove()
    return found


def output_of(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
