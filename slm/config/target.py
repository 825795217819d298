"""conf/target and conf/ladder: what is exported, for which hardware, and the choice among it."""

import enum
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from slm.config.common import require_name
from slm.errors import InputError
from slm.target_name import true_name, untrue


class ExecutionProvider(enum.Enum):
    """ONNX Runtime's execution providers, by the names of the model builder's `-e`."""

    cpu = "cpu"
    cuda = "cuda"
    dml = "dml"
    webgpu = "webgpu"
    NvTensorRtRtx = "NvTensorRtRtx"


class Precision(enum.Enum):
    """Precision of the weights, by the names of the model builder's `-p`."""

    int4 = "int4"
    int8 = "int8"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def bits(self) -> int | None:
        """Of a quantized weight; None where weights are floats."""
        return {"int4": 4, "int8": 8}.get(self.value)


class Quantizer(enum.Enum):
    """Who rounds the weights to int4 or int8.

    `rtn` is the exporter's own round to nearest, one tensor at a time: the builder's `default` to
    the bit. `grid` keeps the integers and scales of a checkpoint that was quantized before, such as
    a GGUF. `mse` searches the scale of least squared error, `gptq` scales and integers together;
    both weigh errors by the inputs that a calibration text gives, layer by layer. `builder` leaves
    it to the builder and its options, at three times the memory.
    """

    rtn = "rtn"
    grid = "grid"
    mse = "mse"
    gptq = "gptq"
    builder = "builder"

    @property
    def calibrates(self) -> bool:
        """Whether it reads a text."""
        return self in (Quantizer.mse, Quantizer.gptq)


class Prompts(enum.Enum):
    """The products of a second graph, which prompts are read by (slm/exporters/prompts.py)."""

    int8 = "int8"


BLOCK_SIZES = (16, 32, 64, 128, 256)  # of MatMulNBits
# Those that a quantizer can make; the others leave it to the builder.
PRECISIONS = {
    Quantizer.grid: [Precision.int4],
    Quantizer.mse: [Precision.int4, Precision.int8],
    Quantizer.gptq: [Precision.int4, Precision.int8],
}
# The model builder's options of how it quantizes itself; older names of them begin with int4_.
QUANTIZING = frozenset(
    {
        "is_symmetric",
        "matmul_mixed_precision",
        "matmulnbits_weights_prepacked",
        "nodes_to_exclude",
        "op_types_to_quantize",
        "use_qdq",
    }
)


@dataclass
class Target:
    """A hardware target: what the model builder is told, and which runtime wheel serves the result.

    `builder_options` are the builder's `--extra_options`. `runtime_package` is pinned to the
    version of the onnxruntime-genai that exported the model; `provider_package`, a pin, brings the
    execution provider if the runtime does not. What the words of `name` say of the target has to be
    true (slm/target_name.py). `int8` are endings of the names of
    linears to which `quantizer=gptq` leaves 8 bits, as the checkpoint names them. Of
    `budget_mb` and `budget_bits` one may be given instead: `gptq` then leaves 8 bits to the linears
    that int4 harms most. The budget is what the linears' integers and scales take: 10^6 bytes, or
    bits for each weight, which suits models of any size. `prompts` asks for a second graph.
    """

    name: str = MISSING
    execution_provider: ExecutionProvider = MISSING
    precision: Precision = MISSING
    runtime_package: str = MISSING
    provider_package: str | None = None
    quantizer: Quantizer = Quantizer.builder
    int8: list[str] = field(default_factory=list)
    budget_mb: float | None = None
    budget_bits: float | None = None
    prompts: Prompts | None = None
    builder_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_name("target.name", self.name)
        if not isinstance(self.precision, Precision):  # the YAML lacks it, which Hydra says
            return
        options, quantizer = self.builder_options, f"target.quantizer={self.quantizer.value}"
        own = self.precision.bits and self.quantizer is not Quantizer.builder
        fits = options.get("block_size") in BLOCK_SIZES
        fits &= options.get("algo_config", "default") == "default"
        unheeded = [key for key in options if key in QUANTIZING or key.startswith("int4_")]
        precisions = PRECISIONS.get(self.quantizer, list(Precision))
        mixing = {name: getattr(self, name) for name in ("int8", "budget_mb", "budget_bits")}
        mixing = {name: value for name, value in mixing.items() if value not in (None, [])}
        mixes = self.precision is Precision.int4 and self.quantizer is Quantizer.gptq
        first = next((f"target.{name} is {value}" for name, value in mixing.items()), "")
        positive = all(0 < v < float("inf") for v in mixing.values() if not isinstance(v, list))
        for broken, words in (
            (
                own and not fits,
                f"{quantizer} needs a block_size of 16, 32, 64, 128 or 256, and no algo_config "
                f"but default; found {options}. Other algorithms are the builder's: "
                "target.quantizer=builder.",
            ),
            (
                own and unheeded,
                f"target.builder_options has {', '.join(unheeded)}, which the builder's own "
                "quantizer alone heeds: leave it out, or set target.quantizer=builder.",
            ),
            (
                self.precision not in precisions,
                f"target.precision is {self.precision.value}; with {quantizer} it must be "
                f"{' or '.join(each.value for each in precisions)}.",
            ),
            (
                options.get("accuracy_level", 0) not in range(5),
                f"target.builder_options.accuracy_level is {options.get('accuracy_level')}; it "
                "must be from 0 to 4.",
            ),
            (len(mixing) > 1, f"target has {' and '.join(mixing)}; give one of them."),
            (not positive, f"{first}; it must be above 0."),
            (
                mixing and not mixes,
                f"{first}, which only target.quantizer=gptq with precision=int4 can heed.",
            ),
            (
                self.prompts and not (own and self.execution_provider is ExecutionProvider.cpu),
                f"target.prompts is int8, which is for int4 and int8 on the CPU, by a quantizer of "
                f"this project; the target is {self.precision.value} for "
                f"{self.execution_provider.value}, by {quantizer}.",
            ),
        ):
            if broken:
                raise InputError(words)
        self.require_served()
        self.require_true_name()

    @property
    def accuracy_level(self) -> int:
        """4 rounds activations to int8 inside the matrix products, 0 leaves them."""
        return int(self.builder_options.get("accuracy_level", 0))

    @property
    def mixed(self) -> bool:
        """Whether some linears of an int4 model keep 8 bits."""
        return bool(self.int8 or self.budget_mb or self.budget_bits)

    def require_served(self) -> None:
        """Raise InputError if the provider does not read weights of this kind."""
        rounded = isinstance(self.precision, Precision) and bool(self.precision.bits)
        read = self.quantizer is Quantizer.rtn and self.precision is Precision.int4
        if self.execution_provider is ExecutionProvider.NvTensorRtRtx and rounded and not read:
            raise InputError(
                f"target.precision is {self.precision.value} by {self.quantizer.value}; for "
                "TensorRT-RTX it must be int4 by target.quantizer=rtn, or floats."
            )

    def require_true_name(self) -> None:
        """Raise InputError if the name says otherwise than the other keys."""
        if "???" in (self.name, self.precision, self.execution_provider):
            return  # what the YAML lacks is said elsewhere
        options, quantizer = self.builder_options, self.quantizer.value
        if self.quantizer is Quantizer.builder:
            algorithm = options.get("algo_config", "default")
            quantizer = {"default": "rtn"}.get(algorithm, algorithm)
        if self.mixed:
            quantizer = "mixed"
        bits = self.precision.bits
        own: dict[str, Any] = {
            "execution_provider": self.execution_provider.value,
            "precision": self.precision.value,
            "quantizer": quantizer if bits else None,
            "block_size": options.get("block_size", 32) if bits else None,
            "accuracy_level": self.accuracy_level if bits else None,
            "prompts": self.prompts.value if self.prompts else None,
        }
        if found := untrue(self.name, own):
            raise InputError(
                f"target.name is {self.name}, which says that {'; that '.join(found)}. "
                f"Name it as it is: target.name={true_name(own)}."
            )


class Objective(enum.Enum):
    """Which target `choose` takes of those that passed their gates and kept the budget.

    `closest` is the one whose KL divergence from the checkpoint is least, `smallest` that of the
    least size on disk, `fastest` that of the most decoded tokens a second, `cheapest` the first of
    the ladder, after which nothing else is tried.
    """

    closest = "closest"
    smallest = "smallest"
    fastest = "fastest"
    cheapest = "cheapest"


@dataclass
class Ladder:
    """Targets for `choose`, by name, the cheapest to make first."""

    targets: list[str] = MISSING

    def __post_init__(self) -> None:
        names = self.targets  # what the YAML lacks is the string "???"
        if isinstance(names, list) and (not names or len(set(names)) < len(names)):
            raise InputError(f"ladder.targets is {names}; it must hold targets, each once.")
