"""The Hugging Face hub: what it says of a model, and its errors in words that name the cure."""

from pathlib import Path
from typing import Any

import httpx


def hub_info(name: str, revision: str, files_metadata: bool = False) -> Any:
    """What the hub says of a model at a revision; HF_TOKEN is sent where set, and never logged."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(
            name, revision=revision, files_metadata=files_metadata, timeout=30
        )
    except (httpx.HTTPError, OSError) as error:
        raise hub_error(name, revision, error) from error


def hub_file(name: str, revision: str, path: str) -> Path:
    """A file of a dataset at the hub, in the Hugging Face cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=revision))
    except (httpx.HTTPError, OSError) as error:
        raise hub_error(f"datasets/{name}/{path}", revision, error) from error


def hub_error(name: str, revision: str, error: Exception) -> Exception:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"hf://{name} is gated: accept its terms on the hub, and set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"hf://{name} does not exist, or is private: check the name, or set HF_TOKEN."
        )
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(f"hf://{name} does not exist at {revision}.")
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"hf://{name} has no revision {revision}.")
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, HfHubHTTPError):
        return ConnectionError(f"the model hub refused hf://{name} at {revision}: {reason}.")
    return ConnectionError(
        f"the model hub cannot be reached for hf://{name}: {reason}. "
        "Check the network (HF_ENDPOINT, HTTPS_PROXY), or point at a local copy instead."
    )
