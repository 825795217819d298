"""Graphs by onnxruntime-genai's model builder, called in this process.

Memory would go where the builder quantizes a whole float model at once, so `save` (graph.py) takes
over where the graph is made. The functions that set a configuration right each stand for a fault of
onnxruntime-genai 0.18, found by parity.py.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from slm.config.target import Precision, Target
from slm.errors import StepError
from slm.running.patched import patched

if TYPE_CHECKING:  # it takes a third of a second, also where an export is reused
    import onnx_ir as ir

Save = Callable[["ir.Model", Path], None]


def make(
    checkpoint: Path, target: Target, precision: Precision, folder: Path, save: Save | None
) -> None:
    """Make the ONNX folder of a checkpoint.

    `save` writes its graph; None leaves quantizing and writing to the builder. Raises StepError if
    the builder does not know the architecture.
    """
    import onnxruntime_genai.models.builder as builder
    from builders.base import Model  # the name under which the builder imports it

    own = target.execution_provider.value
    place = (str(checkpoint), str(folder), precision.value, own)
    cache = str(folder.with_name("cache"))
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        options = builder.parse_extra_options("", *place, cache, extra_options(target))
        config = options["hf_details"]["hf_config"]
        for mend in (window_of_every_layer, rope_of_newer_configurations):
            mend(config)
        stack.enter_context(rope_of_any_model())
        stack.enter_context(layers_without_rope())
        if save is not None:
            stack.enter_context(patched(Model, "make_packed_matmul_float_class", joining_late))
            stack.enter_context(patched(Model, "save_model", saving_by(save)))
        try:
            builder.create_model("", *place, cache, **options)
        except NotImplementedError as error:
            unknown = "model is not currently supported" in str(error)
            what = config.architectures[0] if unknown else f"it: {error}"
            raise StepError(f"the model builder does not support {what}") from error


def builder_arguments(target: Target) -> list[str]:
    """What the builder is told, in the words of its command line."""
    own = ["-p", target.precision.value, "-e", target.execution_provider.value]
    return [*own, "--extra_options", *extra_options(target)]


def extra_options(target: Target) -> list[str]:
    """The builder's `--extra_options`. The runtime keeps whole caches, of windowed layers too.

    A target that names no accuracy level has none, whoever quantizes it: left to itself, the
    builder (0.18) takes 4 for a CPU and WebGPU.
    """
    options = {"windowed_kv_cache": False, **target.builder_options}
    if target.precision.bits:
        options.setdefault("accuracy_level", 0)
    return [f"{key}={str(value).lower()}" for key, value in options.items()]


def window_of_every_layer(config: Any) -> None:
    """Phi-3 and Mistral: the window is that of all layers, which the builder does not know."""
    if config.model_type in ("phi3", "mistral") and config.sliding_window:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def rope_of_newer_configurations(config: Any) -> None:
    """Set what the builder reads under names that transformers 5 no longer writes."""
    rope = getattr(config, "rope_parameters", None)  # GPT-2 and its like have none
    if (
        isinstance(rope, dict) and "sliding_attention" in rope
    ):  # Gemma 3: one for each kind of layer
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        rope = config.rope_parameters = dict(rope["full_attention"])
        config.rope_theta = rope["rope_theta"]
    if isinstance(rope, dict) and "rope_type" in rope:
        rope.setdefault("type", rope["rope_type"])


@contextlib.contextmanager
def rope_of_any_model() -> Any:
    """Let each model have each type of rotary embedding that the builder knows of any.

    Its Llama knows `llama3` alone and drops the others without a word; its other models refuse
    `llama3`, and `dynamic`, which changes nothing within the context length.
    """
    from builders.base import Model
    from builders.llama import LlamaModel

    llama3, others = LlamaModel.make_rope_init, Model.make_rope_init

    def make_rope_init(self: Any, config: Any) -> None:
        rope = getattr(config, "rope_parameters", None)
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind == "llama3":
            llama3(self, config)
        elif kind not in (None, "dynamic"):
            others(self, config)

    with (
        patched(LlamaModel, "make_rope_init", make_rope_init),
        patched(Model, "make_rope_init", make_rope_init),
    ):
        yield


@contextlib.contextmanager
def layers_without_rope() -> Any:
    """SmolLM3: leave out the rotary embedding of the layers that have none.

    The builder takes it out of their attention, and then writes one beside it.
    """
    from builders.llama import LlamaModel
    from builders.smollm import SmolLM3Model

    def make_attention(self: Any, layer_id: int, *args: Any, **kwargs: Any) -> None:
        own, before = self.attention_attrs, dict(self.attention_attrs)
        window, has_rope = self.window_size, bool(self.no_rope_layers[layer_id])
        own |= {"rope": has_rope, "use_rope_in_attn": has_rope and own["use_rope_in_attn"]}
        if self.layer_types[layer_id] == "full_attention":
            self.window_size = -1
        LlamaModel.make_attention(self, layer_id, *args, **kwargs)
        own |= {name: before[name] for name in ("rope", "use_rope_in_attn")}
        self.window_size = window

    with patched(SmolLM3Model, "make_attention", make_attention):
        yield


def joining_late(_: Any, *projections: Any) -> Any:
    """What takes the place of the builder's joining of q, k and v.

    onnxruntime-genai 0.18 copies them for every layer before the first weight is written.
    """
    return SimpleNamespace(weight=Joined([each.weight.detach() for each in projections]))


@dataclass(frozen=True)
class Joined:
    """The rows of several weights as one, joined each time that torch reads them."""

    parts: list[Any]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, inputs = sum(len(part) for part in self.parts), self.parts[0].shape[1]
        return (inputs, rows) if self.transposed else (rows, inputs)

    @property
    def T(self) -> "Joined":
        return replace(self, transposed=not self.transposed)

    def __dlpack__(self, **options: Any) -> Any:
        import torch

        joined = torch.cat(self.parts)
        return (joined.T if self.transposed else joined).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.parts[0].__dlpack_device__()


def saving_by(save: Save) -> Callable[[Any, str], None]:
    """What takes the place of the builder's own `save_model`."""

    def save_model(self: Any, folder: str) -> None:
        self.stamp_build_metadata(self.model)
        save(self.model, Path(folder) / self.filename)

    return save_model
