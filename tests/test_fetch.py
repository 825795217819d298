import json
import shutil
from pathlib import Path

import pytest

from steps.config import Model
from steps.fetch import Checkpoint, fetch, resolve
from steps.provenance import digest_file
from tests.conftest import Project, composed


def fetched(source: Path | str, tmp_path: Path, **changes: object) -> Checkpoint:
    model = Model(name="m", source=str(source), licence="apache-2.0", **changes)  # type: ignore[arg-type]
    folder = tmp_path / "fetched"
    folder.mkdir()
    return fetch(model, resolve(model), folder)


@pytest.fixture
def checkpoint(smollm2: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged; its weights are a link, to be replaced only."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in smollm2.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).hardlink_to(path)
        elif path.name != "provenance.json":
            shutil.copy(path, folder / path.name)
    return folder


def test_a_gguf_in_a_package_becomes_a_checkpoint_with_its_digests(packaged: Project) -> None:
    outcome = packaged.made["fetch"]
    folder = Path(outcome["uri"])
    assert set(outcome["files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert all(digest_file(folder / name) == digest for name, digest in outcome["files"].items())
    assert (outcome["licence"], outcome["revision"]) == ("apache-2.0", "0.1.2")


def test_the_tokenizer_of_a_gguf_has_its_special_tokens(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (
        tokenizer.decode(tokenizer.encode("Émile: 3 + 4,  日本 👍🏽")) == "Émile: 3 + 4,  日本 👍🏽"
    )


def test_a_local_folder_is_taken_over_without_code_and_pickles(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("modeling_evil.py", "tokenizer_evil.py", "tokenizer.pkl", "training_args.bin"):
        (checkpoint / name).write_text("raise SystemExit('executed')")
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    folder = Path(fetched(checkpoint, tmp_path).uri)
    assert not [p for p in folder.iterdir() if p.suffix in (".py", ".pkl", ".bin")]
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert "auto_map" in json.loads((checkpoint / "config.json").read_text())


def test_pickle_weights_are_refused_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin, refused: loading a pickle runs code"
    ):
        fetched(checkpoint, tmp_path)


def test_truncated_safetensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()[:1_000_000]
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        fetched(checkpoint, tmp_path)


def test_a_missing_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors"):
        fetched(checkpoint, tmp_path)


def test_another_digest_than_expected_stops_the_run(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: SHA-256 is .*; expected 00"):
        fetched(checkpoint, tmp_path, sha256={"config.json": "00"})


def test_a_digest_for_a_file_that_does_not_come_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"names model\.safetensorz, which .* does not bring"):
        fetched(checkpoint, tmp_path, sha256={"model.safetensorz": "00"})


def test_a_tokenizer_without_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        fetched(checkpoint, tmp_path)


def test_an_unknown_architecture_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace("LlamaFor", "NoSuchFor"))
    with pytest.raises(ValueError, match="NoSuchForCausalLM is not among"):
        fetched(checkpoint, tmp_path)


def test_another_architecture_than_expected_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is LlamaForCausalLM; model\.architecture expects Phi3"):
        fetched(checkpoint, tmp_path, architecture="Phi3ForCausalLM")


def test_a_gguf_file_with_a_wrong_magic_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML and more")
    with pytest.raises(ValueError, match="not a GGUF file: it begins with b'GGML'"):
        fetched(tmp_path, tmp_path)


@pytest.mark.parametrize("source", ["ftp://x/y", "pypi://unpinned/model.gguf"])
def test_an_unknown_kind_of_source_names_the_valid_ones(source: str) -> None:
    with pytest.raises(ValueError, match="valid: hf://org/name@revision, pypi://"):
        resolve(Model(name="m", source=source, licence="mit"))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="/no/such: no such folder"):
        resolve(Model(name="m", source="/no/such", licence="mit"))


def test_a_pinned_commit_needs_no_hub_to_resolve() -> None:
    source = resolve(composed("model=phi-3-mini-4k-instruct").model)
    assert source.revision == "0a67737cc96d2554230f90338b163bc6380a2a85"
