"""The signature of a logged model, as OpenSSF's Model Signing has it, held against its files.

https://github.com/ossf/model-signing-spec
"""

import os
import re
from pathlib import Path

SIGNATURE = "model.sig"
# What MLflow 3.17 writes into a model after it was signed: the name of its version where one is
# downloaded, and, on Databricks, copies of MLmodel and requirements that it never loads.
UNSIGNED = (SIGNATURE, "registered_model_meta", "metadata")
# The environment variable with the path of the public key that a model has to be signed with.
PUBLIC_KEY = "SLM_MODEL_PUBLIC_KEY"


class SignatureError(ValueError):
    """A model is not signed, or was changed after it was signed."""


def verify(model: Path, public_key: Path) -> None:
    """Raise SignatureError unless all files of a model's folder, and no others, were signed.

    `public_key` is of an elliptic curve, in PEM.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from model_signing.verifying import Config
    except ImportError as error:
        raise SignatureError(
            f"a signature is asked for, and {error.name} is not installed: "
            "pip install model-signing pyopenssl"
        ) from error
    try:
        verifier = Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: the key has no curve
        raise SignatureError(
            f"{public_key} is not the public key of an elliptic curve, in PEM: {error}"
        ) from error
    if not (model / SIGNATURE).is_file():
        raise SignatureError(f"the model is not signed: it has no {SIGNATURE}")
    try:
        verifier.verify(model, model / SIGNATURE)
    except InvalidSignature as error:
        raise SignatureError(foreign_key(public_key)) from error
    except (ValueError, KeyError, TypeError) as error:
        if "Key mismatch" in str(error):
            raise SignatureError(foreign_key(public_key)) from error
        raise SignatureError(f"the model is not as it was signed: {differences(error)}") from error


def foreign_key(public_key: Path) -> str:
    return f"{SIGNATURE} was not made with the key of {public_key}"


def differences(error: Exception) -> str:
    """Which files differ; model-signing 1.1 says it in English, with digests as bytes."""
    text = str(error)
    others = re.findall(r"(?:Extra|Missing) files[^\"\]]+", text)
    changed = re.findall(r"Hash mismatch for \\?'(.+?)\\?': Expected", text)
    return "; ".join([*others, *(f"{name} was changed" for name in changed)]) or text


def verify_at_load(model: Path) -> None:
    """Verify a model that is being loaded, if this process's environment names a public key."""
    if public_key := os.environ.get(PUBLIC_KEY):
        verify(model, Path(public_key))
