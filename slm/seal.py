"""What seals a logged model: its bill of materials, and a signature over every file of it.

The signature is OpenSSF's Model Signing (https://github.com/ossf/model-signing-spec), by a key of
an elliptic curve. It is made before the model is uploaded, and slm_pyfunc/verify.py checks it.
"""

import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow

from slm.config.packaging import Signing
from slm.digests import digest_file
from slm.errors import InputError, StepError, one_line
from slm.records import LoggedModel
from slm.running.work import versions
from slm_pyfunc.verify import SIGNATURE, UNSIGNED, SignatureError, verify

PASSWORD = "SLM_SIGNING_PASSWORD"  # of the private key, if it is encrypted
# What verifies a signature, in requirements of a signed model; model-signing 1.1 imports pyopenssl,
# and does not require it.
VERIFIER = ("model-signing", "pyopenssl")


class Sealed:
    """An MLflow flavor that seals what it saves, for `mlflow.models.Model.log`."""

    def __init__(
        self, flavor: ModuleType, model: LoggedModel, requirements: list[str], signing: Signing
    ) -> None:
        self.flavor, self.model = flavor, model
        self.requirements, self.signing = requirements, signing

    def save_model(self, path: str, **arguments: Any) -> None:
        from slm.sbom import SBOM, sbom

        folder = Path(path)
        self.flavor.save_model(path=path, pip_requirements=self.requirements, **arguments)
        for bytecode in folder.rglob("__pycache__"):  # MLflow tried the code, and would remove it
            shutil.rmtree(bytecode)
        (folder / SBOM).write_text(sbom(self.model, self.requirements))
        sign(folder, self.signing)


def sign(folder: Path, signing: Signing) -> None:
    """Sign a model's folder if a key is configured; InputError if the keys are not usable."""
    if signing.private_key is None:
        return
    from model_signing.hashing import Config as Hashing
    from model_signing.signing import Config

    assert signing.public_key is not None
    password = os.environ.get(PASSWORD)
    try:
        signer = Config().use_elliptic_key_signer(
            private_key=signing.private_key,
            password=password.encode() if password else None,  # type: ignore[arg-type]
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"signing.private_key={signing.private_key} is not the key of an elliptic curve, in "
            f"PEM, or {PASSWORD} is not its password: {one_line(error)}"
        ) from error
    signer.set_hashing_config(Hashing().set_ignored_paths(paths=UNSIGNED))
    signer.sign(folder, folder / SIGNATURE)
    try:
        verify(folder, Path(signing.public_key))
    except SignatureError as error:
        raise InputError(
            f"signing.public_key={signing.public_key} does not belong to signing.private_key: "
            f"{one_line(error)}"
        ) from error


def signed_by(signing: Signing) -> str:
    """The SHA-256 of the file of the public key with which models are signed, "" for none."""
    return digest_file(Path(signing.public_key)) if signing.public_key else ""


def require_key_to_sign(signing: Signing) -> None:
    """Raise InputError if models have to be signed and cannot be: register would refuse them."""
    if signing.public_key and not signing.private_key:
        raise InputError(
            f"signing.public_key={signing.public_key} is set, and signing.private_key is not: "
            "register would refuse the unsigned model. Set both, or neither."
        )


def require_signed(uris: list[str], signing: Signing) -> None:
    """Raise StepError unless each model is, file by file, as the owner of the public key signed it.

    Does nothing if none is configured. Models are downloaded, unless their store is a folder here.
    """
    for uri in uris if signing.public_key else []:
        with tempfile.TemporaryDirectory() as scratch:
            before, tempfile.tempdir = tempfile.tempdir, scratch  # where MLflow leaves its copies
            try:
                folder = mlflow.artifacts.download_artifacts(artifact_uri=uri)
                verify(Path(folder), Path(str(signing.public_key)))
            except SignatureError as error:
                raise StepError(f"{uri} is not to be trusted: {one_line(error)}.") from error
            finally:
                tempfile.tempdir = before


def verifier_requirements(signing: Signing) -> list[str]:
    """Pins of what a signed model needs to verify itself at load."""
    pins = versions(*VERIFIER) if signing.private_key else {}
    return [f"{package}=={version}" for package, version in pins.items()]
