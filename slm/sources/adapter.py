"""A PEFT adapter over its base: where that lies, and the checkpoint that both make.

PEFT itself merges, one module at a time over memory-mapped weights, so that memory holds a module
and a shard and never the model. The result is that of its `merge_and_unload`, to the bit.
"""

import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm.config.model import Model
from slm.digests import Provenance, digest_files, digest_of
from slm.errors import InputError, one_line
from slm.running.work import versions
from slm.sources.bring import bring
from slm.sources.resolve import Source, resolve
from slm.sources.verify import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WHOLE,
    Declared,
    Permit,
    is_weights,
    read_json,
    require_digest,
    write_json,
)
from slm.sources.weights import Tensor, listed, quiet_transformers, read_tensors

log = logging.getLogger("slm.sources")

SHARD_BYTES = 128 << 20  # twice in memory while a shard is written
PREFIX = "base_model.model."  # of the names in an adapter's file
NAME = "default"  # what PEFT calls the adapter
HUB_NAME = r"[\w.-]+/[\w.-]+"
# `init_lora_weights` that leave the base as it is. PEFT's others (0.21) alter it: PiSSA, OLoRA,
# CorDA and LoRA-GA subtract the adapter's first product from it, LoftQ quantizes it.
BEGINNINGS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Names under which a hub has the same model in four bits, for training.
QUANTIZED_COPY = re.compile(r"(-unsloth)?-bnb-4bit$")


def sources_of(model: Model) -> tuple[Model, Source, Source | None]:
    """The model with its base, the source of its checkpoint, and of its adapter if it has one."""
    adapter = resolve(model.adapter, model) if model.adapter else None
    if adapter and model.source is None:
        model = replace(model, source=base_of(adapter, str(model.adapter)))
    return model, resolve(str(model.source), model), adapter


def bring_merged(
    source: Source,
    adapter: Source,
    model: Model,
    checkpoint: Path,
    permit: Permit,
    permit_adapter: Permit,
) -> tuple[Declared, Provenance]:
    """Bring a base and an adapter, and merge them; return also where the adapter came from.

    An adapter that states no licence is taken to have its base's.
    """
    where = str(model.adapter)
    if licence := adapter.licence():
        permit_adapter(licence)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        taken = take_adapter(adapter, model, source, Path(scratch) / "adapter")
        files = digest_files(taken)
        base = Path(scratch) / "base"
        base.mkdir()
        declared = bring(source, model, base, permit, taken)
        log.info("fetch: merging %s into %s", where, model.source)
        merge(base, taken, where, checkpoint)
    provenance = Provenance(
        files,
        source=adapter.pinned,
        revision=adapter.revision or digest_of(files),
        licence=licence or "",
        training=adapter.training,
        versions=versions("peft"),
    )
    return declared, provenance


def base_of(adapter: Source, uri: str) -> str:
    """The source of an adapter's base, as MLflow or its own configuration names it."""
    if recorded := getattr(adapter, "base", ""):
        return str(recorded)
    with tempfile.TemporaryDirectory() as scratch:
        config = read_json(adapter.take([ADAPTER_CONFIG], Path(scratch)) / ADAPTER_CONFIG)
    name, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if Path(name).is_absolute() and Path(name).is_dir():
        return name
    if re.fullmatch(HUB_NAME, name):
        return f"hf://{name}@{revision}" if revision else f"hf://{name}"
    raise InputError(
        f"{uri}: {ADAPTER_CONFIG} names its base as {name!r}, which is not there. Give the base as "
        "model.source."
    )


def require_base(config: dict[str, Any], pinned: str, where: str) -> None:
    """Raise if the adapter names another model of the hub as its base than the one that is taken.

    Organizations are passed over: a mirror holds the same model under another one.
    """
    given = re.match(rf"hf://({HUB_NAME})@", pinned)
    named = str(config.get("base_model_name_or_path") or "")
    if given and re.fullmatch(HUB_NAME, named) and bare(named) != bare(given[1]):
        raise InputError(
            f"{where} is an adapter of {named}; model.source is {given[1]}. Give its own base, or, "
            "if they are the same model, a local copy of it."
        )


def require_plain_beginning(config: dict[str, Any], where: str) -> None:
    """Raise if PEFT altered the base when training began: the adapter belongs to that one alone."""
    began = str(config.get("init_lora_weights", True))
    if began.lower() not in BEGINNINGS:
        raise InputError(
            f"{where} was begun with init_lora_weights={began}, which alters the base that it is "
            "added to: merge it with PEFT, and give the merged folder as model.source, or save it "
            "as LoRA (`save_pretrained` with path_initial_model_for_weight_conversion)."
        )


def bare(name: str) -> str:
    return QUANTIZED_COPY.sub("", name.lower().rpartition("/")[2])


def take_adapter(adapter: Source, model: Model, base: Source, folder: Path) -> Path:
    """Bring the adapter's files, and check what needs no base."""
    where, names = str(model.adapter), adapter.names()
    folder.mkdir()
    described = [name for name in names if not is_weights(name)]
    place = adapter.take(described, folder)
    config = read_json(place / ADAPTER_CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(
            f"{where} is an adapter of PEFT's type {kind}; merged are those of LORA alone. Save "
            "what `model.merge_and_unload()` returns, and give that as model.source."
        )
    if config.get("trainable_token_indices"):
        raise InputError(
            f"{where} trains single tokens (trainable_token_indices): merge it with PEFT, and give "
            "the merged folder as model.source."
        )
    require_plain_beginning(config, where)
    require_base(config, base.pinned, where)
    place = adapter.take([ADAPTER_WEIGHTS], folder)
    for name in names:
        if place != folder:
            shutil.copyfile(place / name, folder / name)
        require_digest(folder / name, model.sha256.get(name))
    adapter.require_unchanged(names)
    return folder


def merge(base: Path, adapter: Path, where: str, out: Path) -> None:
    """Write the checkpoint that an adapter and its base make; InputError if they do not fit."""
    if "quantization_config" in read_json(base / "config.json"):
        raise InputError(
            f"the base of {where} is quantized, and an adapter is merged into floats alone: give "
            "the base as it was before as model.source."
        )
    from safetensors import SafetensorError, safe_open

    for path in base.iterdir():
        if not is_weights(path.name) and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    tensors = read_tensors(base, where)
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
            merged = Merge(base, adapter, tensors, file, where)
            write_shards(merged.weights(), out)
    except SafetensorError as error:
        raise InputError(
            f"{where}: {ADAPTER_WEIGHTS} is truncated or damaged. Fetch it again."
        ) from error
    if rows := merged.rows:
        path = out / "config.json"
        write_json(path, read_json(path) | {"vocab_size": rows})


class Merge:
    """A base on the meta device, and the adapter that PEFT put into it."""

    def __init__(
        self, base: Path, adapter: Path, tensors: dict[str, Tensor], file: Any, where: str
    ) -> None:
        self.tensors, self.file, self.where = tensors, file, where
        self.left = set(file.keys())  # of the adapter's tensors, those that nothing took
        self.rows = 0  # of the embedding, if the adapter changed how many
        self.model = injected(base, adapter, where)
        self.adapted = dict(self.modules("BaseTunerLayer"))
        self.load()

    def modules(self, kind: str) -> Iterator[tuple[str, Any]]:
        """PEFT's modules of a kind, by the name of what they stand for."""
        from peft.tuners import tuners_utils
        from peft.utils import other

        known = getattr(tuners_utils, kind, None) or getattr(other, kind)
        for name, module in self.model.named_modules():
            if isinstance(module, known):
                yield name.removeprefix(PREFIX), module

    def load(self) -> None:
        """Give the adapter's modules their numbers, in float32 as PEFT has them."""
        import torch
        from peft.utils.save_and_load import set_peft_model_state_dict

        for module in self.adapted.values():
            for part, child in module.named_children():
                if part != "base_layer":
                    child.to_empty(device="cpu")
        prefixes = tuple(f"{PREFIX}{name}." for name in self.adapted)
        held = {k for k in self.left if k.startswith(prefixes) and ".base_layer." not in k}
        state = {key: self.file.get_tensor(key) for key in held}
        whole = {  # read as they are written
            f"{PREFIX}{name}.{part}": torch.empty_like(weight, device="meta")
            for name, wrapper in self.modules("ModulesToSaveWrapper")
            for part, weight in wrapper.original_module.named_parameters()
        }
        missing = whole.keys() - self.left
        self.left -= held
        try:
            loaded: Any = set_peft_model_state_dict(self.model, state | whole, NAME)
        except (RuntimeError, KeyError) as error:
            raise InputError(
                f"{self.where} does not fit its base: it is an adapter of another model, or "
                f"damaged: {one_line(error)[:300]}"
            ) from error
        missing |= self.numbers() & set(loaded.missing_keys)
        if missing:
            raise InputError(
                f"{self.where} lacks {listed(sorted(missing))}, which its {ADAPTER_CONFIG} asks "
                "for: it was not saved whole. Save it again."
            )
        if lost := sorted(loaded.unexpected_keys):
            raise InputError(
                f"{self.where} holds {listed(lost)}, which its {ADAPTER_CONFIG} has no place for: "
                "one of the two is of another training. Save both again."
            )

    def numbers(self) -> set[str]:
        """The adapter's parameters, as PEFT calls them."""
        return {
            f"{PREFIX}{name}.{part}"
            for name, module in self.adapted.items()
            for part, _ in module.named_parameters()
            if not part.startswith("base_layer.")
        }

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Every weight of the merged model by name, in the order of the base's names."""
        of_module = {
            f"{name}.{part}": name
            for name, module in self.adapted.items()
            for part, _ in module.get_base_layer().named_parameters()
        }
        if lost := sorted(set(of_module) - set(self.tensors)):
            raise InputError(
                f"{self.where} adapts {listed(lost)}, which its base does not keep under that name "
                "or shares with another weight (tied embeddings): merge it with PEFT, and give the "
                "merged folder as model.source."
            )
        done: set[str] = set()
        for name in self.tensors:
            module = of_module.get(name)
            if module is None:
                yield name, self.replaced(name)
            elif module not in done:
                done.add(module)
                yield from self.merged(module)
        for key in sorted(self.left):  # a head of its own beside tied embeddings
            if key.removeprefix(PREFIX) == "lm_head.weight":
                yield "lm_head.weight", self.trained(key, self.tensors_type())
        if self.left:
            raise InputError(
                f"{self.where} holds {listed(sorted(self.left))}, which its base has no place for: "
                "it is an adapter of another model."
            )

    def replaced(self, name: str) -> Any:
        """A weight that the adapter holds whole (`modules_to_save`), else the base's own."""
        key = PREFIX + name
        base = self.base_weight(name)
        if key not in self.left:
            return base
        whole = self.trained(key, base.dtype)
        if whole.shape != base.shape:
            rows, columns = whole.shape[0], whole.shape[1:]
            if columns != base.shape[1:] or not name.endswith(
                ("embed_tokens.weight", "lm_head.weight")
            ):
                raise self.of_another_model(name, whole, base)
            self.rows = rows
        return whole

    def trained(self, key: str, dtype: Any) -> Any:
        self.left.discard(key)
        return self.file.get_tensor(key).to(dtype)

    def merged(self, name: str) -> Iterator[tuple[str, Any]]:
        """The weights of one module, merged by PEFT."""
        module = self.adapted[name]
        layer = module.get_base_layer()
        parts = sorted(part for part, _ in layer.named_parameters())
        layer.load_state_dict({part: self.beneath(name, part) for part in parts}, assign=True)
        try:
            module.merge(adapter_names=[NAME])
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"{self.where} cannot be merged into {name}: {one_line(error)[:300]}"
            ) from error
        yield from [(f"{name}.{part}", getattr(layer, part).data) for part in parts]
        module.to("meta")

    def beneath(self, name: str, part: str) -> Any:
        """What an adapted module is merged into: the base's, or what the adapter holds of it whole.

        Whole are the biases that it trained (`bias`), and embeddings that were saved beside it.
        """
        key, base = f"{PREFIX}{name}.base_layer.{part}", self.base_weight(f"{name}.{part}")
        if key not in self.left:
            return base
        whole = self.trained(key, base.dtype)
        if whole.shape != base.shape:
            raise self.of_another_model(f"{name}.{part}", whole, base)
        return whole

    def of_another_model(self, name: str, whole: Any, base: Any) -> InputError:
        return InputError(
            f"{self.where}: {name} is {list(whole.shape)}, and {list(base.shape)} in its base: it "
            "is an adapter of another model."
        )

    def base_weight(self, name: str) -> Any:
        """A copy of a weight of the base: PEFT writes into it."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].path, "pt") as file:
            return file.get_tensor(name).clone()

    def tensors_type(self) -> Any:
        embedding = next(name for name in self.tensors if name.endswith("embed_tokens.weight"))
        return self.base_weight(embedding).dtype


def injected(base: Path, adapter: Path, where: str) -> Any:
    """The base's model without numbers, with the adapter's modules in their places."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    try:
        with warnings.catch_warnings(), quiet_transformers(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            settings = PeftConfig.from_pretrained(str(adapter))
            settings.inference_mode = True
            return PeftModel(model, settings, NAME, low_cpu_mem_usage=True).eval()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{where} does not fit its base: {one_line(error)[:300]}. Give its own base as "
            "model.source."
        ) from error


def write_shards(weights: Iterator[tuple[str, Any]], out: Path) -> None:
    """Write weights as they come, in shards of bounded size, and their index."""
    from safetensors.torch import save_file

    held: dict[str, Any] = {}
    shards: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(held, out / f"shard-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, weight in weights:
        held[name] = weight.contiguous()
        total += weight.nbytes
        if sum(w.nbytes for w in held.values()) >= SHARD_BYTES:
            flush()
    if held or not shards:
        flush()
    if len(shards) == 1:
        (out / "shard-0.safetensors").rename(out / WHOLE)
        return
    place: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (out / f"shard-{number}.safetensors").rename(out / file)
        place |= dict.fromkeys(names, file)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
