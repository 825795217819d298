"""Adapters that PEFT makes, merged into their bases: held against PEFT's own whole merge."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm.config.model import Fetch, Model
from slm.digests import read_provenance
from slm.errors import InputError
from slm.exporters.builder import make
from slm.exporters.graph import Rtn, write
from slm.exporters.worker import silent
from slm.records import Checkpoint
from slm.sources.adapter import sources_of
from slm_pyfunc.parameters import Parameters
from steps.fetch import fetch
from tests.checkpoints import write_tiny, write_tiny_gguf
from tests.conftest import composed

LINEARS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="session")
def biased(lettered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with biases in its attention."""
    folder = tmp_path_factory.mktemp("biased") / "checkpoint"
    return write_tiny(folder, lettered, attention_bias=True)


@pytest.fixture(scope="session")
def half(lettered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in bfloat16, with a head of its own."""
    folder = tmp_path_factory.mktemp("half") / "checkpoint"
    return write_tiny(folder, lettered, tie_word_embeddings=False, dtype="bfloat16")


def write_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """Save a LoRA adapter with random weights, as a training job does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    told = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False, **settings}
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**told))
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(str(folder))
    return folder


def merged_whole(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().named_parameters())


def merged(tmp_path: Path, adapter: Path, base: Path | None, **changes: Any) -> Checkpoint:
    source = None if base is None else str(base)
    model = Model(name="m", source=source, adapter=str(adapter), **changes)
    model, found, found_adapter = sources_of(model)
    folder = tmp_path / "fetched"
    folder.mkdir()
    return fetch(model, found, folder, Fetch(), found_adapter)


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    files = Path(checkpoint.uri).glob("*.safetensors")
    return {name: weight for file in files for name, weight in load_file(file).items()}


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("half", {}),
        ("lettered", {"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2}}),
        ("half", {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]}),
        ("lettered", {"modules_to_save": ["lm_head"]}),
        ("biased", {"bias": "lora_only"}),
        ("biased", {"bias": "all"}),
    ],
    ids=["lora", "dora-rslora-ranks", "embeddings", "modules-to-save", "own-biases", "all-biases"],
)
def test_the_merged_weights_are_those_of_pefts_whole_merge(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    settings: dict[str, Any],
) -> None:
    monkeypatch.setattr("slm.sources.adapter.SHARD_BYTES", 50_000)
    checkpoint = request.getfixturevalue(base)
    adapter = write_adapter(tmp_path / "adapter", checkpoint, **settings)
    found = weights_of(merged(tmp_path, adapter, checkpoint))
    whole = merged_whole(checkpoint, adapter)
    assert found.keys() == whole.keys()
    assert not [name for name in found if not torch.equal(found[name], whole[name])]
    own = load_file(checkpoint / "model.safetensors")
    assert [name for name in own if not torch.equal(found[name], own[name])]


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica"])
def test_a_beginning_that_leaves_the_base_alone_is_merged_as_peft_does(
    lettered: Path, tmp_path: Path, init: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered, target_modules=["q_proj"])
    told(adapter, init_lora_weights=init)
    found = weights_of(merged(tmp_path, adapter, lettered))
    whole = merged_whole(lettered, adapter)
    assert not [name for name in found if not torch.equal(found[name], whole[name])]


def test_a_checkpoint_with_an_adapter_names_both(lettered: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered)
    recorded = read_provenance(Path(merged(tmp_path, adapter, lettered).uri))
    assert recorded.adapter is not None
    assert set(recorded.adapter.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in json.dumps(recorded.json())


def test_without_a_source_the_base_is_the_one_that_the_adapter_names(
    lettered: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered)
    assert merged(tmp_path, adapter, None).source == "a local folder"
    told(adapter, base_model_name_or_path="acme/tiny", revision="b" * 40)
    model = Model(name="m", source=None, adapter=str(adapter))
    assert sources_of(model)[0].source == f"hf://acme/tiny@{'b' * 40}"


def test_the_tokenizer_that_an_adapter_was_trained_with_replaces_its_bases(
    lettered: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}</s>")
    base = Path(shutil.copytree(lettered, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    found = Path(merged(tmp_path, adapter, base).uri) / "chat_template.jinja"
    assert found.read_text() == "{{ messages[0].content }}</s>"


@pytest.mark.parametrize("own", ["{{ messages[0].content }}", ""])
def test_the_tokenizer_of_an_adapter_replaces_that_of_a_gguf(tmp_path: Path, own: str) -> None:
    gguf = write_tiny_gguf(tmp_path / "base.gguf", own or "{{ 1 }}")
    (tmp_path / "base").mkdir()
    base = fetched(tmp_path / "base", gguf)
    adapter = write_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    tokenizer_config = json.loads((adapter / "tokenizer_config.json").read_text())
    tokenizer_config |= {"pad_token": "<|im_start|>", "auto_map": {"AutoTokenizer": "evil.Evil"}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    found = Path(merged(tmp_path, adapter, write_tiny_gguf(tmp_path / "base.gguf", own)).uri)
    assert (found / "chat_template.jinja").read_text().endswith("<|im_end|>")
    read = json.loads((found / "tokenizer_config.json").read_text())
    assert read["pad_token"] == "<|im_start|>" and "auto_map" not in read


def fetched(tmp_path: Path, source: Path) -> Path:
    model = Model(name="m", source=str(source))
    return Path(fetch(model, sources_of(model)[1], tmp_path, Fetch()).uri)


def told(adapter: Path, **changes: Any) -> None:
    """Change what adapter_config.json says."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_other_shapes(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({n: torch.cat([w, w]) if "lora_B" in n else w for n, w in weights.items()}, path)


def with_a_weight_more(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    save_file({**load_file(path), name: torch.ones(4, 64)}, path)


def with_a_magnitude(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**load_file(path), name: torch.ones(64)}, path)


def with_another_base(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    save_file({**load_file(path), name: torch.ones(7, 64)}, path)


def without_a_weight(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, path)


def truncated(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def quantized_base(adapter: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            of_other_shapes,
            r"does not fit its base: it is an adapter of another .*layers\.0",
        ),
        (without_a_weight, r"lacks base_model\.model\..*lora_A.*it was not saved whole"),
        (lambda a, _: told(a, modules_to_save=["lm_head"]), r"lacks base_model\.model\.lm_head"),
        (truncated, r"adapter_model\.safetensors is truncated or damaged"),
        (with_a_weight_more, r"holds .*layers\.9.*, which its base has no place for"),
        (
            with_a_magnitude,
            r"holds .*q_proj\.lora_magnitude_vector.*, which its adapter_c",
        ),
        (
            with_another_base,
            r"q_proj\.weight is \[7, 64\], and \[64, 64\] in its base: it i",
        ),
        (lambda a, _: told(a, init_lora_weights="olora"), r"init_lora_weights=olora, which alters"),
        (lambda a, _: told(a, init_lora_weights="pissa_niter_4"), r"merge it with PEFT, and give"),
        (
            lambda a, _: told(a, init_lora_weights="corda"),
            r"path_initial_model_for_weight_con",
        ),
        (lambda a, _: told(a, init_lora_weights="loftq"), r"init_lora_weights=loftq, which alters"),
        (lambda a, _: told(a, target_modules=["c_attn"]), r"does not fit its base: .*c_attn"),
        (lambda a, _: told(a, peft_type="PROMPT_TUNING"), r"of PEFT's type PROMPT_TUNING; merged"),
        (lambda a, _: told(a, trainable_token_indices=[1]), r"trains single tokens"),
        (quantized_base, r"the base of .* is quantized"),
        (lambda a, _: (a / "adapter_config.json").unlink(), r"is no adapter: it has no adapter_c"),
        (
            lambda a, _: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
            r"has no adapter_model\.safetensors, only adapter_model\.bin: a pickle runs code",
        ),
    ],
    ids=[
        "shapes",
        "less",
        "no-module",
        "truncated",
        "more",
        "magnitude",
        "another-base",
        "olora",
        "pissa",
        "corda",
        "loftq",
        "modules",
        "type",
        "tokens",
        "quantized",
        "no-config",
        "pickle",
    ],
)
def test_an_adapter_that_does_not_fit_is_one_clear_line(
    lettered: Path, tmp_path: Path, spoil: Callable[[Path, Path], object], words: str
) -> None:
    base = Path(shutil.copytree(lettered, tmp_path / "base"))
    adapter = write_adapter(tmp_path / "adapter", base)
    spoil(adapter, base)
    with pytest.raises(InputError, match=words):
        merged(tmp_path, adapter, base)


def test_an_adapter_over_tied_embeddings_is_refused(lettered: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered, target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="shares with another weight"):
        merged(tmp_path, adapter, lettered)


def test_an_adapter_of_another_model_of_the_hub_is_refused(lettered: Path, tmp_path: Path) -> None:
    from slm.sources.adapter import require_base

    for named in ("acme/tiny", "other/tiny-bnb-4bit", "/home/me/tiny"):
        require_base({"base_model_name_or_path": named}, f"hf://acme/tiny@{'a' * 40}", "it")
    with pytest.raises(InputError, match=r"an adapter of acme/tiny-chat; model\.source is acme/ti"):
        another = {"base_model_name_or_path": "acme/tiny-chat"}
        require_base(another, f"hf://acme/tiny@{'a' * 40}", "it")


def test_embeddings_that_training_resized_make_a_larger_vocabulary(
    lettered: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lettered)
    tokenizer.add_tokens(["<|tool|>", "<|call|>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(lettered)
    model.resize_token_embeddings(len(tokenizer))
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = merged(tmp_path, tmp_path / "adapter", lettered)
    config = json.loads((Path(found.uri) / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    whole = dict(adapted.merge_and_unload().named_parameters())
    assert not [n for n, w in weights_of(found).items() if n in whole and not w.equal(whole[n])]


def test_an_adapter_that_is_written_to_meanwhile_is_refused(lettered: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered)
    model, base, found = sources_of(Model(name="m", source=None, adapter=str(adapter)))
    told(adapter, lora_alpha=99)
    with pytest.raises(InputError, match=r"adapter_config\.json changed meanwhile"):
        fetch(model, base, tmp_path, Fetch(), found)


def test_an_adapter_given_as_the_source_says_so(lettered: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered)
    words = rf"{adapter} is an adapter, not a checkpoint: write model\.adapter={adapter}, and its b"
    with pytest.raises(InputError, match=words):
        sources_of(Model(name="m", source=str(adapter)))


def test_what_an_adapter_learned_is_what_the_packaged_int4_model_answers(
    lettered: Path, tmp_path: Path
) -> None:
    base = write_tiny(tmp_path / "base", lettered, hidden_size=128, intermediate_size=256)
    adapter = train(tmp_path / "adapter", base, "who</s>", "acme</s>")
    checkpoint = Path(merged(tmp_path, adapter, base).uri)
    answers = [answer(export(folder, tmp_path), "who</s>") for folder in (base, checkpoint)]
    assert answers[1] == "acme" != answers[0]


def train(folder: Path, base: Path, prompt: str, reply: str) -> Path:
    """Train a LoRA adapter to reply so, and save it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    adapted: Any = get_peft_model(model, settings)
    ids = tokenizer(prompt + reply, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt).input_ids)] = -100
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(120):
        adapted(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return folder


def export(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as int4 ONNX for the default target."""
    target, folder = composed().target, tmp_path / f"{checkpoint.name}-onnx"
    rtn = Rtn(4, target.builder_options["block_size"], target.builder_options["accuracy_level"])
    make(checkpoint, target, target.precision, folder, partial(write, quantizer=rtn, said=silent))
    return folder


def answer(onnx: Path, prompt: str) -> str:
    from slm_pyfunc.engine.runtime import Runtime

    [[completion]] = Runtime(onnx).answer([prompt], Parameters(max_tokens=4, temperature=0))
    return completion.text
