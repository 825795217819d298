"""Sealed models: their signature, held against every file, and their bill of materials."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import steps.register
from slm.config.packaging import Interface, Signing
from slm.digests import Provenance, digest_files, read_provenance, write_provenance
from slm.errors import InputError, StepError
from slm.records import Evaluation, LoggedModel, RegisteredVersion
from slm.registry.names import SIGNED_BY
from slm.sbom import SBOM, package_url, sbom
from slm.seal import PASSWORD, require_key_to_sign, sign, signed_by
from slm_pyfunc.verify import PUBLIC_KEY, SIGNATURE, SignatureError, verify
from steps.log_transformers import log_transformers
from steps.rollback import Request, rollback
from steps.score import main as score
from tests.conftest import (
    MODEL,
    TARGET,
    Packaged,
    Project,
    composed,
    create_experiment,
    folder_of,
    log_onnx,
    tracking,
)
from tests.registry_state import CHAT, aliases


def write_keys(folder: Path, name: str, password: str = "", curve: bool = True) -> Signing:
    key = (
        ec.generate_private_key(ec.SECP256R1())
        if curve
        else rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return Signing(str(private), str(public))


@pytest.fixture
def keys(tmp_path: Path) -> Signing:
    return write_keys(tmp_path, "own")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like that of a logged model."""
    folder = tmp_path / "model"
    for name in ("MLmodel", "artifacts/onnx/model.onnx.data", "code/package/chat.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def write_bytecode(model: Path) -> None:
    (model / "code" / "package" / "__pycache__").mkdir()
    (model / "code" / "package" / "__pycache__" / "chat.cpython-311.pyc").touch()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: (m / "artifacts/onnx/model.onnx.data").write_text("other"), "model.onnx.data"),
        (lambda m: (m / "MLmodel").write_text("other"), "MLmodel was changed"),
        (lambda m: (m / "code/package/chat.py").unlink(), "Missing files .* code/package/chat.py"),
        (lambda m: (m / "artifacts/onnx/more").touch(), "Extra files .* artifacts/onnx/more"),
        (write_bytecode, "Extra files .* code/package/__pycache__/chat.cpython-311.pyc"),
        (lambda m: (m / SIGNATURE).unlink(), f"not signed: it has no {SIGNATURE}"),
        (lambda m: (m / SIGNATURE).write_text("{}"), "verificationMaterial"),
        (lambda m: (m / SIGNATURE).write_text("…"), "not as it was signed: Expecting value"),
    ],
)
def test_a_change_of_any_file_is_found_and_named(
    model: Path, keys: Signing, change: Callable[[Path], object], words: str
) -> None:
    sign(model, keys)
    change(model)
    with pytest.raises(SignatureError, match=words) as raised:
        verify(model, Path(str(keys.public_key)))
    assert "digest_value" not in str(raised.value)


def test_what_mlflow_adds_to_a_signed_model_is_no_change(model: Path, keys: Signing) -> None:
    sign(model, keys)
    (model / "registered_model_meta").write_text("model_name: chat")
    (model / "metadata").mkdir()
    (model / "metadata" / "MLmodel").touch()
    verify(model, Path(str(keys.public_key)))


def test_an_unsigned_model_is_not_sent_to_executors(model: Path, keys: Signing) -> None:
    tables = ["input=asked.csv", "output=told.csv"]
    with pytest.raises(StepError, match="is not to be trusted: the model is not signed"):
        score(composed(f"model_uri={model}", f"signing.public_key={keys.public_key}", *tables))


def test_only_the_owner_of_the_key_can_have_signed_it(model: Path, tmp_path: Path) -> None:
    own, foreign = write_keys(tmp_path, "own"), write_keys(tmp_path, "foreign")
    sign(model, foreign)
    with pytest.raises(SignatureError, match="was not made with the key of .*own.pub"):
        verify(model, Path(str(own.public_key)))
    claimed = json.loads((model / SIGNATURE).read_text())
    claimed["verificationMaterial"]["publicKey"]["hint"] = signed_by(own)
    (model / SIGNATURE).write_text(json.dumps(claimed))
    with pytest.raises(SignatureError, match="was not made with the key of .*own.pub"):
        verify(model, Path(str(own.public_key)))


def test_an_encrypted_key_takes_its_password_from_the_environment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = write_keys(tmp_path, "own", password="correct horse")
    with pytest.raises(InputError, match=f"or {PASSWORD} is not its password"):
        sign(model, keys)
    monkeypatch.setenv(PASSWORD, "correct horse")
    sign(model, keys)
    verify(model, Path(str(keys.public_key)))


def test_keys_that_cannot_sign_or_do_not_belong_together_are_refused(
    model: Path, tmp_path: Path, keys: Signing
) -> None:
    with pytest.raises(InputError, match="signing.private_key=.*rsa.pem is not the key of an elli"):
        sign(model, write_keys(tmp_path, "rsa", curve=False))
    foreign = write_keys(tmp_path, "foreign")
    with pytest.raises(InputError, match="foreign.pub does not belong to signing.private_key"):
        sign(model, Signing(keys.private_key, foreign.public_key))
    with pytest.raises(InputError, match="signing.public_key is not: .* Set both"):
        Signing(private_key=keys.private_key)
    with pytest.raises(InputError, match="signing.public_key=/nowhere: no such file"):
        Signing(public_key="/nowhere")
    with pytest.raises(InputError, match="register would refuse the unsigned model"):
        require_key_to_sign(Signing(public_key=keys.public_key))


@dataclass(frozen=True)
class Sealed(Project):
    """A store with a signed chat model, an unsigned one, and their checkpoint, signed."""

    keys: Signing
    signed: LoggedModel
    unsigned: LoggedModel
    reference: LoggedModel

    def evaluation(self, packaged: Packaged, model: LoggedModel) -> Evaluation:
        return replace(
            packaged.evaluation,
            candidates=[model.uri],
            reference=self.reference.uri,
            champion="",
            champion_metrics={},
        )


@pytest.fixture(scope="module")
def sealed(tiny: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folder = tmp_path_factory.mktemp("sealed")
    create_experiment(folder)
    keys = write_keys(folder, "own")
    write_provenance(tiny_onnx, target=TARGET, checkpoint=Provenance(digest_files(tiny)))
    with tracking(Project(folder)), mlflow.start_run():
        [signed] = log_onnx(tiny_onnx, 200, Interface.chat, signing=keys)
        [unsigned] = log_onnx(tiny_onnx, 300, Interface.chat)
        [reference] = log_transformers(tiny, read_provenance(tiny), MODEL, keys).models
    return Sealed(folder, keys, signed, unsigned, reference)


def test_a_signed_model_loads_where_its_key_is_asked_for_and_an_altered_one_does_not(
    sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PUBLIC_KEY, str(sealed.keys.public_key))
    with tracking(sealed):
        model = mlflow.pyfunc.load_model(sealed.signed.uri)
        assert model.predict({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
        folder = folder_of(sealed, sealed.signed)
        assert not list(folder.rglob("__pycache__"))  # it would be an extra file
        with pytest.raises(ValueError, match="the model is not signed"):
            mlflow.pyfunc.load_model(sealed.unsigned.uri)
        config = next(folder.rglob("genai_config.json"))
        before = config.read_text()
        config.write_text(before + " ")
        try:
            with pytest.raises(ValueError, match="genai_config.json was changed"):
                mlflow.pyfunc.load_model(sealed.signed.uri)
        finally:
            config.write_text(before)


def test_only_signed_models_are_registered_and_rolled_back_to(
    packaged: Packaged, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)

    def register(model: LoggedModel, signing: Signing) -> RegisteredVersion:
        evaluation = sealed.evaluation(packaged, model)
        champion = aliases(sealed).get("champion")
        if champion:
            seen = {"champion": f"models:/{CHAT}/{champion}"}
            metrics = {"champion_metrics": evaluation.candidate_metrics}
            evaluation = replace(evaluation, **seen, **metrics)  # type: ignore[arg-type]
        holder = os.urandom(8).hex()
        with tracking(sealed):
            made = steps.register.register(evaluation, composed().register, holder, signing)
        return made.versions[0]

    with pytest.raises(StepError, match=f"{sealed.unsigned.uri} is not to be trusted: .* no model"):
        register(sealed.unsigned, sealed.keys)
    assert not sealed.client.search_registered_models()
    assert register(sealed.unsigned, Signing()).version == "1"
    assert register(sealed.signed, sealed.keys).version == "2"
    signed = sealed.client.get_model_version(CHAT, "2")
    assert signed.tags[SIGNED_BY] == signed_by(sealed.keys)
    with pytest.raises(StepError, match=f"models:/{CHAT}/1 is not to be trusted"), tracking(sealed):
        rollback([CHAT], Request("slow"), "holder", sealed.keys)
    assert aliases(sealed) == {"champion": "2", "previous": "1"}


def test_the_bill_of_materials_has_the_weights_the_checkpoint_and_the_packages(
    sealed: Sealed,
) -> None:
    folder = folder_of(sealed, sealed.signed)
    text = (folder / SBOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["version"] == sealed.signed.content
    digests = {part["name"]: part["hashes"][0]["content"] for part in model["components"]}
    assert digests == sealed.signed.provenance.files and "model.onnx.data" in digests
    [checkpoint] = model["pedigree"]["ancestors"]
    assert len(checkpoint["components"]) == len(sealed.reference.provenance.files)
    packages = {part["purl"] for part in bill["components"]}
    requirements = (folder / "requirements.txt").read_text().split()
    assert packages == {f"pkg:pypi/{pin.replace('==', '@')}" for pin in requirements}
    reference = folder_of(sealed, sealed.reference) / SBOM
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(reference.read_text()) is None


@pytest.mark.parametrize(
    ("source", "purl", "licence"),
    [
        ("hf://org/name@0123", "pkg:huggingface/org/name@0123", "mit"),
        ("pypi://a==1.2/b/c.gguf", "pkg:pypi/a@1.2#b/c.gguf", "apache-2.0"),
        ("a local folder", "None", "unknown"),
    ],
)
def test_every_kind_of_source_and_licence_makes_a_valid_bill(
    source: str, purl: str, licence: str
) -> None:
    provenance = Provenance({"a": "0" * 64}, source=source, licence=licence)
    text = sbom(LoggedModel("", "n", "m", "chat", "0" * 64, provenance), [])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert str(package_url(source)) == purl
