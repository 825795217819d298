"""Checkpoints as people have them: weights that are not the model's, or no numbers, are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.errors import InputError
from slm.sources.verify import wanted_names
from slm.sources.weights import Tensor, is_finite, require_weights, weight_files

Weights = dict[str, Any]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def change_weights(checkpoint: Path, change: Callable[[Weights], Weights]) -> None:
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_whole_weights_are_taken_with_what_their_configuration_ties(tiny: Path) -> None:
    assert require_weights(tiny, "tiny") == {"lm_head.weight": EMBEDDING}


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("_orig_mod.", "torch.compile's prefix: save the model that was compiled"),
        ("base_model.model.", "PEFT's prefix: save what `model.merge_and_unload"),
    ],
)
def test_weights_under_a_wrappers_prefix_say_how_to_save_them(
    checkpoint: Path, prefix: str, words: str
) -> None:
    change_weights(checkpoint, lambda weights: {prefix + n: w for n, w in weights.items()})
    missing = r"the model's weights that no file holds: lm_head\.weight, .* and \d+ more"
    with pytest.raises(InputError, match=rf"{missing}.*{words}"):
        require_weights(checkpoint, "x")


def test_only_the_weights_that_transformers_loads_are_taken(checkpoint: Path) -> None:
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "old.safetensors"]
    own = ["config.json", "model.safetensors"]
    assert wanted_names([*own, *stale]) == own
    (checkpoint / "model.safetensors").rename(checkpoint / stale[0])
    of = {name: stale[0] for name in read_tensors_of(checkpoint / stale[0])}
    (checkpoint / stale[1]).write_text(json.dumps({"metadata": {}, "weight_map": of}))
    (checkpoint / stale[2]).write_bytes(b"damaged")
    require_weights(checkpoint, "x")
    assert not (checkpoint / stale[2]).exists() and (checkpoint / stale[0]).exists()


def read_tensors_of(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "np") as weights:
        return list(weights.keys())


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_one_clear_line(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"^x: model\.safetensors\.index\.json is damaged: its w"):
        weight_files(tmp_path, "x")


def test_a_missing_weight_one_too_many_and_a_wrong_shape_are_named(checkpoint: Path) -> None:
    def change(weights: Weights) -> Weights:
        weights["model.layers.7.mlp.up_proj.weight"] = weights.pop(
            "model.layers.1.mlp.up_proj.weight"
        )
        weights["model.norm.weight"] = weights["model.norm.weight"][:7].clone()
        return weights

    change_weights(checkpoint, change)
    with pytest.raises(InputError) as error:
        require_weights(checkpoint, "x")
    for words in (
        "the model's weights that no file holds: model.layers.1.mlp.up_proj.weight",
        "weights of the files that the model does not have: model.layers.7.mlp.up_proj.weight",
        "than config.json says: model.norm.weight is [7], not [64]",
    ):
        assert words in str(error.value)


def test_an_adapter_beside_the_weights_is_refused(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "adapter_model.safetensors")
    with pytest.raises(
        InputError,
        match=r"holds an adapter, adapter_model\.safetensors, beside its weights: put it",
    ):
        require_weights(checkpoint, "x")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(checkpoint: Path, dtype: str, value: float) -> None:
    import torch

    def change(weights: Weights) -> Weights:
        weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
        weights["model.norm.weight"][-1] = value
        return weights

    change_weights(checkpoint, change)
    with pytest.raises(InputError, match=r"model\.norm\.weight in model\.safetensors holds NaN"):
        require_weights(checkpoint, "x")


def test_large_finite_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    np.array([np.finfo(np.float32).max, -0.0, np.finfo(np.float32).tiny], np.float32).tofile(path)
    assert is_finite(Tensor(path, "F32", (3,), 0))
    assert is_finite(Tensor(path, "F32", (0, 3), 0)) and is_finite(Tensor(path, "I64", (1,), 0))


def add_token(checkpoint: Path, content: str) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {"id": 49152, "content": content, "special": True, "single_word": False}
    added |= {"lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))


def test_a_placeholder_of_images_needs_no_row(checkpoint: Path) -> None:
    add_token(checkpoint, "<image_soft_token>")
    require_weights(checkpoint, "x")


def test_a_token_without_a_row_in_the_embedding_is_named(checkpoint: Path) -> None:
    add_token(checkpoint, "<|extra|>")
    with pytest.raises(
        InputError, match=r"49152 rows, none for the tokenizer's '<\|extra\|>' \(id"
    ):
        require_weights(checkpoint, "x")
