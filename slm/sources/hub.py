"""A checkpoint at the Hugging Face hub, and the hub's errors in words that name the cure."""

import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import HTTPError  # of the HTTP client that the hub's library uses

from slm.config import Model
from slm.errors import InputError, UnreachableError, UserError, one_line
from slm.sources.verify import (
    INDEX,
    WANTED,
    WHOLE,
    Declared,
    digest_in_cache,
    is_weights,
    place_description,
    place_weights,
    read_json,
    require_digest,
    require_known,
    require_safetensors,
    wanted_names,
)

log = logging.getLogger("slm.sources")


@dataclass(frozen=True)
class Hub:
    """A model at the hub; `revision` is a commit, whatever branch or tag was given."""

    name: str
    revision: str

    form: ClassVar[str] = "hf://org/name@revision"

    @property
    def pinned(self) -> str:
        return f"hf://{self.name}@{self.revision}"

    @property
    def identity(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def parse(cls, model: Model) -> "Hub | None":
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?", model.source)
        if match is None:
            return None
        name, revision = match.group(1), match.group(2) or "main"
        is_commit = re.fullmatch(r"[0-9a-f]{40}", revision)
        return cls(name, revision if is_commit else hub_info(name, revision).sha)

    def weights_gb(self) -> float | None:
        try:
            files = hub_info(self.name, self.revision, files_metadata=True).siblings
        except UserError:
            return None
        wanted = filter(is_weights, wanted_names([file.rfilename for file in files]))
        sizes = {file.rfilename: file.size or 0 for file in files}
        return sum(sizes[name] for name in wanted) / 1e9 or None

    def bring(self, model: Model, checkpoint: Path) -> Declared:
        """Download the wanted files at the commit, through the Hugging Face cache.

        Without the hub, a commit that is wholly in the cache is taken from there.
        """
        try:
            info = hub_info(self.name, self.revision, files_metadata=True)
        except UnreachableError as unreachable:
            cached = self.cached()
            if cached is None:
                raise
            log.info("fetch: %s; taken from the cache", unreachable)
            names = wanted_names([path.name for path in cached.iterdir()])
            require_known(names, model)
            place_description(cached, names, model, checkpoint)
            for name in filter(is_weights, names):
                require_digest(cached / name, digest_in_cache(cached / name))
            place_weights(cached, names, model, checkpoint)
            return Declared()
        names = [file.rfilename for file in info.siblings]
        require_safetensors(names, f"hf://{self.name}")
        wanted = wanted_names(names)
        require_known(wanted, model)
        described = [name for name in wanted if not is_weights(name)]
        place_description(self.download(described), wanted, model, checkpoint)
        cached = self.download(wanted)
        for file in info.siblings:
            if file.lfs and file.rfilename in wanted:
                require_digest(cached / file.rfilename, file.lfs.sha256)
        place_weights(cached, wanted, model, checkpoint)
        return Declared((info.card_data or {}).get("license"))

    def download(self, names: list[str]) -> Path:
        """Bring files into the cache; return the commit's folder there."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=names))
        except (HTTPError, OSError) as error:
            raise hub_error(self.name, self.revision, error) from error

    def cached(self) -> Path | None:
        """The commit's folder in the cache, if all that a checkpoint needs is there."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    allow_patterns=list(WANTED),
                    local_files_only=True,
                )
            )
        except (HTTPError, OSError, ValueError):
            return None
        index = folder / INDEX
        weights = {WHOLE}
        if index.is_file() and not (folder / WHOLE).is_file():
            weights = set(read_json(index).get("weight_map", {}).values())
        needed = {"config.json", *weights}
        return folder if all((folder / name).is_file() for name in needed) else None


def hub_info(name: str, revision: str, files_metadata: bool = False) -> Any:
    """What the hub says of a model at a revision; HF_TOKEN is sent where set, and never logged."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(
            name, revision=revision, files_metadata=files_metadata, timeout=30
        )
    except (HTTPError, OSError) as error:
        raise hub_error(name, revision, error) from error


def hub_file(name: str, revision: str, path: str) -> Path:
    """A file of a dataset at the hub, in the Hugging Face cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=revision))
    except (HTTPError, OSError) as error:
        raise hub_error(f"datasets/{name}/{path}", revision, error) from error


def hub_error(name: str, revision: str, error: Exception) -> UserError:
    """What an error of the hub means for the user."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return InputError(f"hf://{name} is gated: accept its terms on the hub, and set HF_TOKEN.")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"hf://{name} does not exist, or is private: check the name, or set HF_TOKEN."
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"hf://{name} does not exist at {revision}.")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"hf://{name} has no revision {revision}.")
    reason = one_line(error)[:300]
    if isinstance(error, HfHubHTTPError):
        return UnreachableError(f"the model hub refused hf://{name} at {revision}: {reason}.")
    return UnreachableError(
        f"the model hub cannot be reached for hf://{name}: {reason}. "
        "Check the network (HF_ENDPOINT, HTTPS_PROXY), or point at a local copy instead."
    )
