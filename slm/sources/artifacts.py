"""Files in one of MLflow's artifact repositories: listed with their marks, and brought one by one.

A mark changes when a file's content does. It is what the store itself says of the file (an ETag, a
checksum), so that a second run sees that nothing changed without a download.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from slm.digests import digest_file
from slm.errors import InputError, UnreachableError, UserError, one_line
from slm.running.tracking import environment
from slm.sources.verify import require_inside

# What reads a cloud's storage, by the scheme of its URIs. Each finds its own credentials.
CLIENTS = {
    "s3": "boto3",
    "gs": "google-cloud-storage",
    "abfss": "azure-storage-file-datalake azure-identity",
    "dbfs": "databricks-sdk",
}
QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


@dataclass(frozen=True)
class Listed:
    """A file of a store: its path there, its size in bytes, and its mark ("": none is known)."""

    path: str
    size: int
    mark: str


class Artifacts:
    """The files at an MLflow artifact URI; `shown` is how errors name it.

    `otherwise` is the mark of all files where the store says nothing of their content and yet keeps
    them as they are: the id of a logged model, say. Without it, such files have no mark.
    """

    def __init__(
        self, location: str, shown: str, otherwise: str = "", **stores: str | None
    ) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self.shown, self.otherwise = shown, otherwise
        with explained(shown):
            self.repository = get_artifact_repository(location, **stores)

    def files_in(self, folder: str = "") -> dict[str, Listed]:
        """The files that lie directly in a folder, by name."""
        with explained(self.shown):
            found = [info for info in self.repository.list_artifacts(folder or None) if info.path]
            for info in found:
                require_inside(info.path, self.shown)
            sizes = {info.path: info.file_size or 0 for info in found if not info.is_dir}
            marks = marks_of(self.repository, folder, sizes) if sizes else {}
        return {
            PurePosixPath(path).name: Listed(path, size, marks.get(path) or self.otherwise)
            for path, size in sizes.items()
        }

    def take(self, listed: Listed, destination: Path) -> None:
        """Bring a file; UnreachableError unless all of it came."""
        with (
            tempfile.TemporaryDirectory(dir=destination.parent) as scratch,
            environment({} if sys.stderr.isatty() else QUIET),
            explained(self.shown),
        ):
            brought = self.repository.download_artifacts(listed.path, dst_path=scratch)
            os.replace(brought, destination)
        if (size := destination.stat().st_size) != listed.size:
            raise UnreachableError(
                f"{self.shown}: {listed.path} came with {size} of {listed.size} bytes. "
                "Run it again."
            )

    def read(self, listed: Listed) -> str:
        """The text of a small file."""
        with tempfile.TemporaryDirectory() as scratch:
            self.take(listed, Path(scratch) / "file")
            return (Path(scratch) / "file").read_text()


def marks_of(repository: Any, folder: str, sizes: dict[str, int]) -> dict[str, str]:
    """The marks of files, by path; none where the store says nothing of content."""
    for kind in type(repository).__mro__:
        if marks := MARKS.get(kind.__name__):
            return marks(repository, folder, sizes)
    return {}


def of_local_files(repository: Any, _: str, sizes: dict[str, int]) -> dict[str, str]:
    return {path: digest_file(Path(repository.artifact_dir) / path) for path in sizes}


def of_s3(repository: Any, folder: str, sizes: dict[str, int]) -> dict[str, str]:
    """MLflow 3.17 passes over the ETags: waits for a public way to its client."""
    bucket, root = repository.parse_s3_compliant_uri(repository.artifact_uri)
    root = root.rstrip("/")
    prefix = "/".join(part for part in (root, folder) if part)
    pages = repository._iterate_s3_paginated_results(bucket, f"{prefix}/" if prefix else "")
    etags = {entry["Key"]: entry["ETag"] for page in pages for entry in page.get("Contents", [])}
    return {path: etags.get(f"{root}/{path}" if root else path, "") for path in sizes}


def of_google(repository: Any, _: str, sizes: dict[str, int]) -> dict[str, str]:
    bucket, root = repository.parse_gcs_uri(repository.artifact_uri)
    blobs = {path: repository.client.bucket(bucket).get_blob(f"{root}/{path}") for path in sizes}
    return {path: blob.md5_hash or blob.etag for path, blob in blobs.items() if blob}


def of_azure(repository: Any, _: str, sizes: dict[str, int]) -> dict[str, str]:
    root, client = repository.base_data_lake_directory, repository.fs_client
    return {
        path: client.get_file_client(f"{root}/{path}").get_file_properties().etag for path in sizes
    }


def of_databricks(repository: Any, _: str, sizes: dict[str, int]) -> dict[str, str]:
    """A volume says only when a file was written."""
    return {
        path: str(repository.files_api.get_metadata(repository.full_path(path)).last_modified or "")
        for path in sizes
    }


def of_tracking_server(repository: Any, _: str, sizes: dict[str, int]) -> dict[str, str]:
    """The ETags of a server that keeps artifacts on its disk, or of the bucket behind it.

    A server without signed URLs (MLflow 3.17: of most clouds) copies a file out of the bucket for
    each request, and its ETag is that of the copy: the smallest file shows whether it stays.
    """
    smallest = min(sizes, key=lambda path: sizes[path])
    for etag in (signed_etag, served_etag):
        if (first := etag(repository, smallest)) and first == etag(repository, smallest):
            return {path: etag(repository, path) for path in sizes}
    return {}


def signed_etag(repository: Any, path: str) -> str:
    import requests

    try:
        signed = repository._get_presigned_download_url(path)
    except requests.HTTPError:
        return ""
    headers = {**(signed.headers or {}), "Range": "bytes=0-0"}
    with requests.get(signed.url, headers=headers, stream=True, timeout=60) as answer:
        return answer.headers.get("ETag", "")


def served_etag(repository: Any, path: str) -> str:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(repository.artifact_uri), f"/{path}", "HEAD")
    answer.raise_for_status()
    return answer.headers.get("ETag", "")


MARKS: dict[str, Callable[[Any, str, dict[str, int]], dict[str, str]]] = {
    "LocalArtifactRepository": of_local_files,
    "S3ArtifactRepository": of_s3,
    "GCSArtifactRepository": of_google,
    "AzureDataLakeArtifactRepository": of_azure,
    "DatabricksSdkArtifactRepository": of_databricks,
    "MlflowArtifactsRepository": of_tracking_server,
}


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Errors of any store's client in words that name the cure; a fault of ours stays one."""
    try:
        yield
    except (UserError, AttributeError, KeyError, NameError, TypeError):
        raise
    except ImportError as error:
        packages = CLIENTS.get(shown.partition(":")[0], str(error.name))
        raise InputError(
            f"{shown} needs packages that are missing: pip install {packages}"
        ) from error
    except Exception as error:  # of boto3, google, azure, databricks, requests and MLflow
        raise store_error(shown, error) from error


def store_error(shown: str, error: Exception) -> UserError:
    """What an error of a store's client means for the user."""
    # Not in requests' own words, by which `main` knows that its tracking server went away.
    cause = getattr(next(iter(error.args), None), "reason", None)
    said, status = (
        one_line(cause if isinstance(cause, Exception) else error)[:300],
        status_of(error),
    )
    if status in (401, 403) or "credentials" in said.lower():
        return InputError(
            f"you may not read {shown}: {said}. Check the credentials that its client finds "
            "(in the environment, a profile, a role), and what they are allowed."
        )
    if status == 404 or said.endswith("not found."):
        return InputError(f"{shown} does not exist: {said}.")
    if isinstance(error, OSError) or status is None or status >= 500:
        return UnreachableError(
            f"{shown} cannot be read: {said}. Run it again when its store answers."
        )
    return InputError(f"{shown} cannot be read: {said}.")


def status_of(error: Exception) -> int | None:
    """The HTTP status behind an error of a store's client; None if there is none."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for value in (getattr(error, n, None) for n in ("status_code", "code")):
        if isinstance(value, int):
            return value
    return getattr(answer, "status_code", None)
