"""Checkpoints in a bucket and on a web server: real servers on loopback, and their real clients."""

import contextlib
import datetime
import functools
import json
import shutil
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from slm.config.model import Fetch, Model
from slm.errors import InputError, UnreachableError
from slm.sources.resolve import Source, resolve
from slm.sources.web import Web, listed_in
from steps.fetch import fetch
from tests.conftest import Project

NAMES = ("name=m", "licence=null", "architecture=null", "context_length=null")


class Bucket:
    """Moto's S3 server with one bucket, and the keys of a user who may read nothing."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.server.start()
        self.address = "http://{}:{}".format(*self.server.get_host_and_port())
        self.client("s3").create_bucket(Bucket="models")

    def client(self, service: str) -> Any:
        import boto3

        told = {"endpoint_url": self.address, "region_name": "us-east-1"}
        return boto3.client(
            service, aws_access_key_id="writer", aws_secret_access_key="writer", **told
        )

    def put(self, folder: Path, prefix: str = "ours/tiny") -> str:
        for path in folder.iterdir():
            self.client("s3").upload_file(str(path), "models", f"{prefix}/{path.name}")
        return f"s3://models/{prefix}"

    def without_rights(self) -> dict[str, str]:
        """The keys of a user without rights, which count from now on."""
        iam = self.client("iam")
        iam.create_user(UserName="nobody")
        key = iam.create_access_key(UserName="nobody")["AccessKey"]
        self.heed_rights("0")
        secret = key["SecretAccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": secret}

    def heed_rights(self, after_requests: str) -> None:
        url, told = f"{self.address}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, after_requests.encode(), told)).close()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    yield made
    made.server.stop()


@pytest.fixture
def at_bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The environment in which boto3 finds the bucket, by its own conventions."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", bucket.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret-key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return bucket


def source_of(uri: str) -> Source:
    return resolve(uri, Model(name="m", source=uri))


def own(source: str) -> list[str]:
    return [f"model.source='{source}'", *(f"model.{value}" for value in NAMES)]


def test_a_folder_of_a_bucket_is_the_revision_of_the_same_local_folder(
    at_bucket: Bucket, lettered: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = at_bucket.put(lettered)
    size = (lettered / "model.safetensors").stat().st_size
    assert source_of(uri).weights_gb() == size / 1e9  # for plan, before anything is brought
    fetched = project.call("fetch", *own(uri))
    assert (fetched.source, fetched.revision) == (uri, source_of(str(lettered)).revision)
    monkeypatch.setattr(
        "mlflow.store.artifact.artifact_repo.ArtifactRepository.download_artifacts",
        lambda *_, **__: pytest.fail("a file was downloaded"),
    )
    assert project.call("fetch", *own(uri)).uri == fetched.uri
    [run, _] = project.runs("fetch")
    logged = json.dumps([run.data.params, run.data.tags])
    assert run.data.tags["reused"] == "true" and "secret" not in logged


def test_one_byte_in_a_bucket_makes_another_source(
    at_bucket: Bucket, lettered: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(lettered, tmp_path / "changed"))
    uri = at_bucket.put(changed, "changing")
    before = source_of(uri).identity
    assert source_of(uri).identity == before
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    at_bucket.put(changed, "changing")
    assert source_of(uri).identity != before


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])  # of the same size, and of another
def test_a_bucket_that_is_written_to_meanwhile_is_refused(
    at_bucket: Bucket, lettered: Path, tmp_path: Path, activation: str
) -> None:
    changed = Path(shutil.copytree(lettered, tmp_path / "changed"))
    model = Model(name="m", source=at_bucket.put(changed, "written"))
    source = source_of(str(model.source))
    config = (changed / "config.json").read_text()
    (changed / "config.json").write_text(config.replace('"silu"', f'"{activation}"'))
    at_bucket.put(changed, "written")
    with pytest.raises(InputError, match=r"s3://models/written: config\.json changed meanwhile"):
        fetch(model, source, tmp_path, Fetch())


def test_a_gguf_of_a_bucket_is_chosen_by_its_path(at_bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "ggufs").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "ggufs" / name).write_bytes(b"GGUF")
    uri = at_bucket.put(tmp_path / "ggufs", "ggufs")
    with pytest.raises(InputError, match=rf"2 GGUF files: .* model\.source={uri}/a\.gguf"):
        source_of(uri)
    assert source_of(f"{uri}/b.gguf").names() == ["b.gguf"]
    assert source_of(f"{uri}/b.gguf").weights_gb() == 4 / 1e9


def test_a_bucket_without_permission_is_one_clear_line(
    at_bucket: Bucket, lettered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = at_bucket.put(lettered, "closed")
    keys = at_bucket.without_rights()
    try:
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        _forget_clients()
        with pytest.raises(
            InputError, match=r"you may not read s3://models/closed: .* Check the cr"
        ):
            source_of(uri)
    finally:
        at_bucket.heed_rights("Infinity")
        _forget_clients()


def _forget_clients() -> None:
    """MLflow keeps clients of S3, and their keys, for minutes."""
    from mlflow.store.artifact import s3_artifact_repo

    s3_artifact_repo._cached_get_s3_client.cache_clear()


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/x", "s3://models/nothing/here"])
def test_what_is_not_in_a_bucket_is_one_clear_line(at_bucket: Bucket, uri: str) -> None:
    with pytest.raises(InputError, match="does not exist|holds no files"):
        source_of(uri)


def test_a_cloud_whose_client_is_missing_names_the_packages() -> None:
    with pytest.raises(InputError, match="pip install google-cloud-storage"):
        source_of("gs://bucket/folder")


class Pages(SimpleHTTPRequestHandler):
    """Python's web server with ETags, ranges, and downloads that break off."""

    listed = True
    cut_off_at: list[int] = []
    asked: list[tuple[str, str, str | None]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).asked.append((self.command, self.path, self.headers.get("Range")))
        path = Path(self.translate_path(self.path))
        if path.is_dir() and self.listed:
            return super().do_GET() if self.command == "GET" else super().do_HEAD()
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            big = path.suffix == ".safetensors" and self.cut_off_at
            self.wfile.write(content[start : self.cut_off_at.pop() if big else len(content)])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    path.write_bytes(built.public_bytes(encoding) + private)
    return path


@pytest.fixture
def pages(
    lettered: Path, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """The URL of a folder on an https server, and the folder."""
    folder = Path(shutil.copytree(lettered, tmp_path / "www" / "ours" / "tiny")).parent.parent
    handler = type("Own", (Pages,), {"cut_off_at": [], "asked": [], "listed": True})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("tests.test_stored.SERVED", handler)
    yield f"https://127.0.0.1:{server.server_address[1]}/ours/tiny", folder / "ours" / "tiny"
    server.shutdown()
    thread.join()
    server.server_close()


SERVED: type[Pages] = Pages  # the handler of the server that runs


def test_a_folder_that_a_web_server_lists_is_the_revision_of_the_same_local_folder(
    pages: tuple[str, Path], lettered: Path, project: Project
) -> None:
    fetched = project.call("fetch", *own(pages[0]))
    assert fetched.revision == source_of(str(lettered)).revision
    SERVED.asked.clear()
    project.call("fetch", *own(pages[0]))
    assert not [path for verb, path, _ in SERVED.asked if verb == "GET" and "." in path[-12:]]


def in_shards(folder: Path, *names: str) -> None:
    """Split the weights into shards under these names, with an index."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, name in enumerate(names):
        part = dict(list(weights.items())[number :: len(names)])
        with contextlib.suppress(OSError):
            save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_without_a_listing_the_index_names_the_shards(pages: tuple[str, Path]) -> None:
    SERVED.listed = False
    in_shards(pages[1], "one.safetensors", "two.safetensors")
    names = source_of(pages[0]).names()
    assert {"one.safetensors", "two.safetensors", "config.json"} <= set(names)


def test_a_download_from_a_web_server_goes_on_where_it_broke_off(
    pages: tuple[str, Path], tmp_path: Path
) -> None:
    SERVED.cut_off_at += [100_000]
    source = source_of(pages[0])
    source.take(["model.safetensors"], tmp_path)
    again = [asked for _, path, asked in SERVED.asked if path.endswith("model.safetensors")][-1]
    assert again and 0 < int(again[6:-1]) <= 100_000
    original = (pages[1] / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == original


def test_a_download_that_never_ends_is_one_clear_line(
    pages: tuple[str, Path], tmp_path: Path
) -> None:
    SERVED.cut_off_at += [1000] * 9
    with pytest.raises(UnreachableError, match=r"model\.safetensors came with 0 of \d+ bytes"):
        source_of(pages[0]).take(["model.safetensors"], tmp_path)


def test_a_file_that_changes_while_it_is_fetched_is_refused(
    pages: tuple[str, Path], tmp_path: Path
) -> None:
    source = source_of(pages[0])
    (pages[1] / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json changed meanwhile"):
        source.take(["config.json"], tmp_path)


def test_an_index_that_names_a_path_outside_the_folder_is_refused(pages: tuple[str, Path]) -> None:
    (pages[1] / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (pages[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    SERVED.listed = False
    with pytest.raises(
        InputError, match=r"names \.\./\.\./secret\.safetensors, which lies outside"
    ):
        source_of(pages[0])


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": null}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_on_a_web_server_is_one_clear_line(
    pages: tuple[str, Path], index: str
) -> None:
    path = pages[1] / "model.safetensors.index.json"
    path.write_text(index)
    SERVED.listed = False
    assert "model.safetensors" in source_of(pages[0]).names()  # whole weights need no index
    (pages[1] / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json is (not|damaged)"):
        source_of(pages[0])


def test_json_that_lists_no_files_is_no_listing() -> None:
    nginx = '[{"name": "a", "type": "directory"}, {"name": "b.json", "type": "file", "size": 1}]'
    assert listed_in(nginx, "x") == ["b.json"]
    for odd in ("{", "{}", "3", "null", '["a"]', '[{"path": "a"}]', '[{"name": 3}]', '{"a": 1}'):
        assert listed_in(odd, "x") == []
    with pytest.raises(InputError, match=r"names \.\./a, which lies outside"):
        listed_in('[{"name": "../a"}]', "x")


def test_links_out_of_the_folder_are_not_followed(pages: tuple[str, Path]) -> None:
    (pages[1].parent / "config.json").write_text("another")
    page = (
        '<a href="../config.json">up</a><a href="/x/model.safetensors">x</a><a href="a.txt">a</a>'
    )
    (pages[1] / "index.html").write_text(page)
    assert Web(pages[0], "", pages[0]).listing() == ["a.txt"]


def test_a_password_in_a_url_is_sent_and_not_recorded(pages: tuple[str, Path]) -> None:
    secret = pages[0].replace("https://", "https://me:hunter2hunter2@") + "?sig=abcdefgh"
    source = source_of(secret)
    assert source.pinned == pages[0] and "hunter2" not in json.dumps(source.identity)
    assert any("sig=abcdefgh" in path for _, path, _ in SERVED.asked)


def test_a_web_server_that_is_away_is_one_clear_line() -> None:
    with pytest.raises(UnreachableError, match=r"https://127\.0\.0\.1:9/x cannot be read"):
        source_of("https://127.0.0.1:9/x")
