"""A checkpoint at the Hugging Face hub, and the hub's errors in words that name the cure."""

import functools
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import HTTPError  # of the HTTP client that the hub's library uses
from yaml import YAMLError

from slm.config.model import Model
from slm.errors import InputError, UnreachableError, UserError, one_line
from slm.sources.gguf import template_beside
from slm.sources.verify import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WANTED,
    WHOLE,
    digest_in_cache,
    holds_weights,
    read_json,
    require_digest,
    shards_in,
    taken_names,
)

log = logging.getLogger("slm.sources")

CARD = "README.md"  # states the licence


@dataclass(frozen=True)
class Hub:
    """A model at the hub, or a GGUF file of one; `revision` is a commit, whatever was given.

    `uri` is the source as it was given, `file` a path in the repository.
    """

    name: str
    revision: str
    file: str
    uri: str
    model: Model

    form: ClassVar[str] = "hf://org/name@revision, hf://org/name@revision/file.gguf"

    @property
    def pinned(self) -> str:
        return self.at(self.file) if self.file else f"hf://{self.name}@{self.revision}"

    @property
    def training(self) -> dict[str, str]:
        return {}

    @property
    def identity(self) -> dict[str, str]:
        file = {"file": self.file} if self.file else {}
        return {"name": self.name, "revision": self.revision, **file}

    @classmethod
    def parse(cls, uri: str, model: Model) -> "Hub | None":
        place, file = (uri, "")
        if match := re.fullmatch(r"(hf://[\w.-]+/[\w.-]+(?:@[^\s/]+)?)/(\S+\.gguf)", uri):
            place, file = match.groups()
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?", place)
        if match is None:
            return None
        name, revision = match.group(1), match.group(2) or "main"
        is_commit = re.fullmatch(r"[0-9a-f]{40}", revision)
        commit = revision if is_commit else hub_info(name, revision).sha
        return cls(name, commit, file, uri, model)

    def at(self, file: str) -> str:
        """A file of the model, as a source."""
        return f"hf://{self.name}@{self.revision}/{file}"

    def names(self) -> list[str]:
        """What is taken of the repository; of what the cache holds if the hub is away."""
        try:
            return self.taken([file.rfilename for file in self.files()])
        except UnreachableError as unreachable:
            _, names = self.from_cache(unreachable)
            log.info("fetch: %s; taken from the cache", unreachable)
            return names

    def taken(self, names: list[str]) -> list[str]:
        """What is taken of the commit's files."""
        if not self.file:
            return taken_names(names, self.uri, self.model, self.at)
        if self.file not in names:
            ggufs = ", ".join(name for name in names if name.endswith(".gguf")) or "none"
            raise InputError(f"{self.uri} has no {self.file}; its GGUF files: {ggufs}.")
        return [self.file, *template_beside(self.file, names)]

    @functools.cached_property
    def info(self) -> Any:
        """What the hub says of the commit, asked once; UnreachableError without the hub."""
        return hub_info(self.name, self.revision, files_metadata=True)

    def files(self) -> list[Any]:
        """All files of the commit: `rfilename`, `size`, and `lfs` of large ones."""
        return self.info.siblings

    def licence(self) -> str | None:
        """As the model's card states it; without the hub, as the card in the cache does."""
        try:
            return (self.info.card_data or {}).get("license")
        except UnreachableError as unreachable:
            folder, _ = self.from_cache(unreachable)
            return licence_of(folder / CARD)

    def weights_gb(self) -> float | None:
        try:
            sizes = {file.rfilename: file.size or 0 for file in self.files()}
            return sum(sizes[name] for name in filter(holds_weights, self.names())) / 1e9 or None
        except UserError:
            return None

    def take(self, names: list[str], folder: Path) -> Path:
        """Bring files at the commit into the Hugging Face cache, and compare their digests.

        The model's card comes with them. Without the hub, a commit that is wholly in the cache is
        taken from there.
        """
        try:
            digests = {file.rfilename: file.lfs.sha256 for file in self.files() if file.lfs}
            cached = self.download([*names, CARD])
            if lacking := [name for name in names if not (cached / name).is_file()]:
                raise UnreachableError(
                    f"the model hub did not give {', '.join(lacking)} of hf://{self.name}. Run it "
                    "again."
                )
        except UnreachableError as unreachable:
            cached, _ = self.from_cache(unreachable)
            digests = {name: digest_in_cache(cached / name) for name in names}
        for name in names:
            require_digest(cached / name, digests.get(name))
        return cached

    def require_unchanged(self, names: list[str]) -> None:
        """A commit does not change."""

    def download(self, names: list[str]) -> Path:
        """Bring files into the cache; return the commit's folder there."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=names))
        except (HTTPError, OSError) as error:
            raise hub_error(self.name, self.revision, error) from error

    def from_cache(self, unreachable: UnreachableError) -> tuple[Path, list[str]]:
        """The commit's folder in the cache, and what is taken of it; raise if any of it is missing.

        The listing of the commit, which huggingface_hub (2.4) keeps of a download, tells that: a
        folder without one may lack a chat template, and nothing would show it. The card is needed
        where no licence is configured.
        """
        from huggingface_hub import get_cached_repo_tree, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self.name, revision=self.revision)
            names = self.taken([file.path for file in tree])
            unlicensed = self.model.licence is None or self.uri == self.model.adapter
            folder = snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=[*names, CARD] if unlicensed else names,
                local_files_only=True,
            )
        except (CachedRepoTreeNotFoundError, OSError) as error:
            raise UnreachableError(
                f"{unreachable} The Hugging Face cache does not hold all of it either (`hf "
                f"download {self.name} --revision {self.revision}` fills it)."
            ) from error
        return Path(folder), names

    def cached(self) -> Path | None:
        """The commit's folder in the cache, if its weights are there."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    allow_patterns=[self.file] if self.file else [*WANTED, ADAPTER_CONFIG],
                    local_files_only=True,
                )
            )
        except (HTTPError, OSError, ValueError):
            return None
        if self.file:
            return folder if (folder / self.file).is_file() else None
        if self.uri == self.model.adapter:
            needed = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
            return folder if all((folder / name).is_file() for name in needed) else None
        index = folder / INDEX
        weights = {WHOLE}
        if index.is_file() and not (folder / WHOLE).is_file():
            weights = set(shards_in(read_json(index), self.uri))
        needed = {"config.json", *weights}
        return folder if all((folder / name).is_file() for name in needed) else None


def licence_of(card: Path) -> str | None:
    """The licence in the head of a model's card; None if there is no card, or none in it."""
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (ValueError, YAMLError):
        return None


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
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return InputError(f"hf://{name} is gated: accept its terms on the hub, and set HF_TOKEN.")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"hf://{name} does not exist, or is private: check the name, or set HF_TOKEN."
        )
    # The client's word for a hub that went away: it is an EntryNotFoundError, too.
    away = isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, EntryNotFoundError) and not away:
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
