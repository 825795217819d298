"""The hf:// source with the real huggingface_hub client, against a small hub on loopback."""

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from slm.config.model import Model
from slm.digests import read_provenance
from slm.errors import InputError, UnreachableError
from slm.evaluation.data import read_texts
from slm.running.chain import kept
from slm.running.run import Ask
from slm.running.work import NotKept
from slm.sources.resolve import Source, resolve
from tests.checkpoints import write_tiny_gguf
from tests.conftest import Project, composed, tracking
from tests.test_adapter import told, write_adapter

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(ThreadingHTTPServer):
    """What a model holds at a revision, and its files in ranges: the calls of fetch."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.commit = COMMIT  # what a branch points at
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.gated = False
        self.broken = False  # its files, not what it says of them
        self.licence: str | None = "apache-2.0"
        self.cut_off_at: list[int] = []  # bytes, one for each answer to come

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.gated or path.endswith("/revision/no-such-tag"):
            self.refuse("GatedRepo" if self.server.gated else "RevisionNotFound")
        elif self.server.broken and "/revision/" not in path:
            self.send_response(501)  # the client asks again after others
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith("/api/models/acme/tiny/revision/"):
            self.answer(self.model_info())
        elif path.startswith(f"/api/models/acme/tiny/tree/{self.server.commit}"):
            self.answer([self.tree_entry(sibling) for sibling in self.model_info()["siblings"]])
        elif path.startswith(
            (f"/acme/tiny/resolve/{self.server.commit}/", "/datasets/acme/texts/resolve/v1/")
        ):
            name = path.removeprefix(f"/acme/tiny/resolve/{self.server.commit}/")
            self.file(name if name in self.server.files else path.rsplit("/", 1)[1], body)
        else:
            self.send_response(404)
            self.end_headers()

    def refuse(self, code: str) -> None:
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def model_info(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, content in self.server.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0"}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
            siblings.append(sibling)
        card = {"license": self.server.licence}
        return {
            "id": "acme/tiny",
            "sha": self.server.commit,
            "siblings": siblings,
            "cardData": card,
        }

    def file(self, name: str, body: bool) -> None:
        content = self.server.files[name]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            cut = self.server.cut_off_at if name.endswith(".safetensors") else []
            self.wfile.write(content[start : cut.pop(0) if cut else len(content)])

    def tree_entry(self, sibling: dict[str, Any]) -> dict[str, Any]:
        entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": "0"}
        if lfs := sibling.get("lfs"):
            entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 1}
        return entry

    def answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (tiny / name).read_bytes() for name in (*names, "model.safetensors")}
    extra = {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"evil", "README.md": CARD}
    server = Hub(files | extra)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


TINY = ["model=phi-3-mini-4k-instruct", "model.source=hf://acme/tiny@main", "model.name=tiny"]
TINY += ["model.licence=apache-2.0", "model.architecture=null", "model.context_length=null"]
PINNED = f"model.source=hf://acme/tiny@{COMMIT}"


CARD = b"---\nlicense: apache-2.0\n---\n"


@pytest.fixture
def at_hub(project: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose client asks this hub, with a cache of its own."""
    resolve = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project.folder / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return project


def in_process(project: Project, hub: Hub, **environment: str) -> Any:
    """`fetch` as a process of its own, whose client is told of the hub by its environment."""
    own = {"HF_HOME": str(project.folder / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "steps.fetch", *TINY]
    return project.run(command, **own, **environment)


def test_a_branch_is_pinned_to_its_commit_and_only_the_needed_files_come(
    at_hub: Project, hub: Hub
) -> None:
    outcome = at_hub.call("fetch", *TINY)
    assert outcome.revision == COMMIT
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(outcome.files) == wanted | {"model.safetensors"}
    assert not [path for _, path, _ in hub.requests if path.endswith((".bin", ".py"))]


def test_a_branch_that_moved_makes_anew_only_what_depends_on_it(at_hub: Project, hub: Hub) -> None:
    def logged() -> tuple[str, str]:
        checkpoint = at_hub.call("fetch", *TINY)
        logged = at_hub.call("log_transformers", *TINY, f"source={checkpoint.uri}")
        return checkpoint.revision, logged.uri

    first = logged()
    hub.commit, hub.files["README.md"], hub.requests = "b" * 40, b"another readme", []
    with (
        pytest.raises(NotKept, match=f"source.revision: {COMMIT} → {hub.commit}"),
        tracking(at_hub),
    ):
        work = f"paths.work={at_hub.folder / 'work'}"
        kept("fetch", composed(*TINY, work), {}, Ask.look)
    second = logged()
    assert second == (hub.commit, first[1])
    assert not [p for verb, p, _ in hub.requests if verb == "GET" and p.endswith(".safetensors")]
    template = hub.files["chat_template.jinja"]
    hub.commit, hub.files["chat_template.jinja"] = "c" * 40, template + b"{# another #}"
    assert logged()[1] != second[1]


def test_the_token_is_sent_but_never_logged(project: Project, hub: Hub) -> None:
    process = in_process(project, hub, HF_TOKEN="hf_secretsecretsecret")
    assert process.returncode == 0, process.stderr
    assert "Bearer hf_secretsecretsecret" in hub.tokens
    [run] = project.runs("fetch")
    [result] = (project.folder / "work" / "fetch").glob("*/result.json")
    logged = json.dumps([run.data.params, run.data.tags]) + result.read_text()
    assert "hf_secret" not in logged + process.stdout + process.stderr


def test_a_download_that_breaks_off_goes_on_where_it_was(at_hub: Project, hub: Hub) -> None:
    hub.cut_off_at = [12_000_000]  # the client keeps whole pieces of 10 MB
    at_hub.call("fetch", *TINY)
    ranges = [r for _, path, r in hub.requests if path.endswith(".safetensors") and r]
    assert len(ranges) == 1 and 0 < int(ranges[0][6:-1]) <= 12_000_000


def test_files_that_came_before_a_failure_are_not_fetched_again(at_hub: Project, hub: Hub) -> None:
    hub.cut_off_at = [1_000_000] * 20
    with pytest.raises(UnreachableError):
        at_hub.call("fetch", *TINY)
    hub.cut_off_at, hub.requests = [], []
    at_hub.call("fetch", *TINY)
    again = [
        path.rsplit("/", 1)[1]
        for verb, path, _ in hub.requests
        if "/resolve/" in path and verb == "GET"
    ]
    assert again == ["model.safetensors"]


def test_a_file_that_differs_from_the_hubs_digest_is_refused(
    at_hub: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_info = Handler.model_info

    def wrong(self: Handler) -> dict[str, Any]:
        info = model_info(self)
        for sibling in info["siblings"]:
            if "lfs" in sibling:
                sibling["lfs"]["sha256"] = "0" * 64
        return info

    monkeypatch.setattr(Handler, "model_info", wrong)
    digest = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    with pytest.raises(InputError, match=f"SHA-256 is {digest}"):
        at_hub.call("fetch", *TINY)


def test_no_network_to_the_hub_is_one_clear_line(project: Project, hub: Hub) -> None:
    hub.server_close()
    process = in_process(project, hub)
    assert process.returncode == 4
    [line] = [x for x in process.stderr.splitlines() if x.startswith("fetch: ")]
    assert "the model hub cannot be reached for hf://acme/tiny" in line


def test_a_pinned_commit_that_is_in_the_cache_needs_no_hub(
    at_hub: Project,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    at_hub.call("fetch", *TINY)
    hub.requests = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level("INFO", "slm"):
        at_hub.call("fetch", *TINY, PINNED, "model.name=again")
    assert "taken from the cache" in caplog.text and not hub.requests


def test_without_the_hub_a_commit_that_is_not_in_the_cache_is_one_clear_line(
    at_hub: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = "^the model hub cannot be reached for hf://acme/tiny"
    with pytest.raises(UnreachableError, match=words):
        at_hub.call("fetch", *TINY, PINNED)


def pinned(licence: str | None = None) -> Source:
    uri = f"hf://acme/tiny@{COMMIT}"
    return resolve(uri, Model(name="tiny", source=uri, licence=licence))


def take(source: Source, folder: Path) -> set[str]:
    """The names of what the source holds; all of it is in the cache then."""
    names = source.names()
    source.take(names, folder)
    return set(names)


def test_what_comes_from_the_cache_has_the_licence_that_its_card_states(
    at_hub: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = take(pinned(), at_hub.folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = pinned()
    assert (take(source, at_hub.folder), source.licence()) == (names, "apache-2.0")


@pytest.mark.parametrize("lost", ["chat_template.jinja", "README.md", "trees"])
def test_without_the_hub_a_cache_that_lacks_a_file_or_the_listing_is_refused(
    at_hub: Project, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    names = take(pinned(), at_hub.folder)
    repository = at_hub.folder / "hf" / "hub" / "models--acme--tiny"
    if lost == "trees":  # as older clients, and transformers, leave it
        shutil.rmtree(repository / lost)
        monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    else:
        (repository / "snapshots" / COMMIT / lost).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = rf"cache does not hold all of it either \(`hf download acme/tiny --revision {COMMIT}`"
    with pytest.raises(UnreachableError, match=words):
        pinned().names()
    if lost == "README.md":
        assert take(pinned("apache-2.0"), at_hub.folder) == names


def test_a_hub_whose_files_fail_is_away_and_the_cache_serves(at_hub: Project, hub: Hub) -> None:
    hub.broken = True
    with pytest.raises(UnreachableError, match=r"cannot be reached for hf://acme/tiny"):
        take(pinned(), at_hub.folder)
    hub.broken = False
    names = take(pinned(), at_hub.folder)
    hub.broken = True
    assert take(pinned(), at_hub.folder) == names


def test_a_checkpoint_that_is_not_as_expected_costs_no_download_of_weights(
    at_hub: Project, hub: Hub
) -> None:
    with pytest.raises(InputError, match="is LlamaForCausalLM; model.architecture expects Phi3"):
        at_hub.call("fetch", *TINY, "model.architecture=Phi3ForCausalLM")
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_a_gguf_at_the_hub_is_chosen_by_its_path(at_hub: Project, hub: Hub, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    content = write_tiny_gguf(tmp_path / "q4.gguf", template).read_bytes()
    hub.files = {"q4/a.gguf": content, "q4/b.gguf": content, "q4/chat_template.jinja": b"{{ 1 }}"}
    source = "model.source=hf://acme/tiny@main"
    with pytest.raises(
        InputError, match=rf"2 GGUF files: .* model\.source=hf://acme/tiny@{COMMIT}/"
    ):
        at_hub.call("fetch", *TINY, source)
    with pytest.raises(InputError, match=r"has no c\.gguf; its GGUF files: q4/a\.gguf, q4/b\.gguf"):
        at_hub.call("fetch", *TINY, f"{source}/c.gguf")
    fetched = at_hub.call("fetch", *TINY, f"{source}/q4/b.gguf")
    assert fetched.source == f"hf://acme/tiny@{COMMIT}/q4/b.gguf"
    assert (Path(fetched.uri) / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert not [path for _, path, _ in hub.requests if path.endswith("a.gguf")]
    assert resolve(fetched.source, composed().model).weights_gb() == len(content) / 1e9  # for plan


def test_an_adapter_at_the_hub_is_merged_into_the_base_that_it_names(
    at_hub: Project, hub: Hub, lettered: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", lettered)
    told(adapter, base_model_name_or_path=str(lettered))
    hub.files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    own = ["model.name=tuned", "model.source=null", "model.licence=null"]
    fetched = at_hub.call("fetch", *TINY, *own, f"model.adapter=hf://acme/tiny@{COMMIT}")
    recorded = read_provenance(Path(fetched.uri)).adapter
    assert recorded and recorded.source == f"hf://acme/tiny@{COMMIT}"
    assert recorded.licence == "apache-2.0"


@pytest.mark.parametrize(
    ("revision", "gated", "words"),
    [
        ("main", True, "hf://acme/tiny is gated: accept its terms on the hub, and set HF_TOKEN"),
        ("no-such-tag", False, "hf://acme/tiny has no revision no-such-tag"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    at_hub: Project, hub: Hub, revision: str, gated: bool, words: str
) -> None:
    hub.gated = gated
    with pytest.raises(InputError, match=words):
        at_hub.call("fetch", *TINY, f"model.source=hf://acme/tiny@{revision}")
    assert not list((at_hub.folder / "work").rglob("*.*"))


def test_a_licence_that_is_not_allowed_costs_no_download_of_weights(
    at_hub: Project, hub: Hub
) -> None:
    allowed = "fetch.allowed_licences=[mit, Apache-2.0]"
    at_hub.call("fetch", *TINY, allowed)
    hub.requests = []
    words = (
        r"the licence of hf://acme/tiny@\w+ is apache-2\.0; fetch\.allowed_licences allows mit\."
    )
    with pytest.raises(InputError, match=words):  # what was fetched before
        at_hub.call("fetch", *TINY, "fetch.allowed_licences=[mit]")
    hub.licence, hub.commit = "gemma", "d" * 40
    with pytest.raises(InputError, match=r"is gemma; fetch\.allowed_licences allows mit, Apache"):
        at_hub.call("fetch", *TINY, allowed, "model.licence=null")
    hub.licence = None
    with pytest.raises(InputError, match=r"states no licence, and .* set model\.licence"):
        at_hub.call("fetch", *TINY, allowed, "model.licence=null")
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_texts_come_from_a_dataset_at_the_hub(at_hub: Project, hub: Hub) -> None:
    hub.files["test.jsonl"] = b'{"body": "One text."}\n{"body": "Another."}\n'
    texts = "'hf://datasets/acme/texts@v1/data/test.jsonl'"
    config = composed(f"evaluate.texts={texts}", "evaluate.text_column=body")
    assert [row["text"] for row in read_texts(config.evaluate)] == ["One text.", "Another."]
