"""`serve`: the registered champions behind one server, asked by the openai client and by hand."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import openai
import pytest

from slm.config.common import ROOT
from slm.config.packaging import Interface
from slm.errors import InputError, StepError
from tests.conftest import MODEL, TARGET, Packaged, Project, copy_store, log_onnx, tracking
from tests.test_seal import write_keys
from tests.test_tools import HERMES, with_template

pytestmark = pytest.mark.xdist_group("serve")  # its fixtures once, not in every process

CHAT, PROMPT = (f"{MODEL}-{TARGET}-{interface}" for interface in ("chat", "prompt"))
KEY = "a-key-of-the-test"
JSON = {"Content_Type": "application/json"}
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [{"type": "function", "function": {"name": "get_time"}}]
STORY = [{"role": "user", "content": "Write a very long story about a lighthouse."}]


class Server:
    """`python -m steps.serve` on a free port."""

    def __init__(self, project: Project, *overrides: str, **environment: str) -> None:
        command = [sys.executable, "-m", "steps.serve", "port=0", *overrides]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**project.environment, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        line = self.wait_for("listening at")
        self.port = int(line.rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"
        self.reader = threading.Thread(target=self.read, daemon=True)

    def wait_for(self, words: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if words in line:
                return line.strip()
        raise AssertionError("".join(self.lines))

    def read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, (str, bytes, type(None))) else json.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"Authorization": f"Bearer {KEY}", **headers}
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = "json" in response.headers["content-type"] and text.strip()
        return response.status, json.loads(text) if is_json else text, dict(response.headers)

    def figure(self, name: str, status: int | str = "") -> float:
        """A figure of the chat model at /metrics, of requests with a status if it is given."""
        _, text, _ = self.ask("GET", "/metrics")
        of = rf'.*status="{status}"' if status else ""
        found = re.findall(rf'^slm_{name}{{model="{CHAT}"{of}.*}} (.+)$', text, re.MULTILINE)
        return sum(map(float, found))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def serving(project: Project, *overrides: str, **environment: str) -> Iterator[Server]:
    server = Server(project, *overrides, **environment)
    try:
        server.wait_for("ready:")
        server.reader.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(packaged: Packaged) -> Iterator[Server]:
    """Both champions; requests need the key, those of `Server.ask` have it."""
    uris = f"model_uri=[models:/{CHAT}@champion,models:/{PROMPT}@champion]"
    settings = "serve.settings={max_batch_size: 4, max_queue_size: 40, context_length: 2048}"
    with serving(packaged, uris, settings, "serve.max_body_mb=0.1", SLM_API_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def chat(messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": CHAT, "messages": messages, "max_tokens": 16, "temperature": 0, **fields}


def test_the_openai_client_streams_what_it_would_get_whole(client: openai.OpenAI) -> None:
    asked: Any = chat(FRANCE)
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content or ""
    assert "Paris" in text and whole.model == CHAT
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**asked, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 5 and {chunk.usage for chunk in chunks} == {None}
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not last.choices and last.usage and whole.usage
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert not list(client.chat.completions.create(**asked, stream=True))[-1].usage


def test_texts_are_completed_one_or_several_as_text_or_tokens(client: openai.OpenAI) -> None:
    asked: Any = {"model": PROMPT, "max_tokens": 6, "temperature": 0}
    texts = ["The capital of France is", "The sky is"]
    both = client.completions.create(prompt=texts, n=2, logprobs=1, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.usage
    pieces = [""] * 4
    for chunk in client.completions.create(prompt=texts, n=2, stream=True, **asked):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [choice.text for choice in both.choices]
    assert pieces[0] == pieces[1] != pieces[2]
    probabilities = both.choices[0].logprobs
    assert probabilities and probabilities.tokens
    assert "".join(probabilities.tokens) == pieces[0]
    ids = client.completions.create(prompt=[504, 3575, 282, 4649, 314], **asked)
    assert ids.choices[0].text == pieces[0]


def test_log_probabilities_come_with_their_tokens(client: openai.OpenAI) -> None:
    asked: Any = chat(FRANCE, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in client.chat.completions.create(**asked, stream=True)]
    streamed = [token for chunk in chunks if chunk for token in chunk.content or []]
    assert whole and streamed == whole.content and len(streamed) == 16


def test_invocations_answer_as_mlflows_server_does(server: Server) -> None:
    status, answer, _ = server.ask("POST", f"/invocations?model={CHAT}", chat(FRANCE), **JSON)
    assert status == 200 and "Paris" in answer["choices"][0]["message"]["content"]
    frame = {"dataframe_split": {"columns": ["prompt"], "data": [["The sky is"], ["One"]]}}
    path, params = f"/invocations?model={PROMPT}", {"params": {"max_tokens": 2}}
    status, answer, _ = server.ask("POST", path, {**frame, **params}, **JSON)
    assert status == 200 and list(map(type, answer["predictions"])) == [str, str]
    wrong = {**frame, "params": {"max_tokens": 0}}
    status, answer, _ = server.ask("POST", path, wrong, **JSON)
    assert status == 400 and answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "max_tokens is 0" in answer["message"]
    assert server.ask("POST", path, "a,b", Content_Type="text/plain")[0] == 415
    assert server.ask("GET", "/ping")[:2] == (200, "\n")


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code", "words"),
    [
        ("chat", "{", 400, None, None, "the body is no JSON"),
        ("chat", "[1]", 400, None, None, "must be a JSON object"),
        ("chat", '{"messages":' * 3000, 400, None, None, ""),
        ("chat", chat([]), 400, "messages", None, "messages is []"),
        ("chat", chat(FRANCE, model="gpt-4"), 404, "model", "model_not_found", "'gpt-4'"),
        ("chat", chat(FRANCE, model=PROMPT), 400, "model", None, "answers /v1/completions"),
        ("chat", chat(FRANCE, stream="yes"), 400, "stream", None, "true or false"),
        ("chat", chat(FRANCE, max_token=5), 400, "max_token", None, "is it max_tokens?"),
        ("chat", chat(FRANCE, **{"\ud800": 1}), 400, None, None, "the name of a field holds"),
        ("chat", chat(FRANCE, top_p=2), 400, "top_p", None, "above 0 and at most 1"),
        ("chat", chat(FRANCE, logit_bias={"99999": 1}), 400, "logit_bias", None, "below 49152"),
        ("chat", chat(FRANCE, tools=TOOLS), 400, "tools", None, "this model calls none"),
        ("chat", chat(FRANCE, n=60), 400, "n", None, "hold 44 answers"),
        ("chat", chat(FRANCE, max_tokens=2048), 400, None, "context_length_exceeded", "2048"),
        ("text", {"model": PROMPT}, 400, "prompt", None, "prompt is None"),
        ("text", {"model": PROMPT, "prompt": "a", "echo": True}, 400, "echo", None, "not serve it"),
        ("text", {"model": PROMPT, "prompt": [10**6]}, 400, "prompt", None, "below 49152"),
        ("chat", "x" * 100_001, 413, None, None, "serve.max_body_mb=0.1"),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(
    server: Server, path: str, body: Any, status: int, param: Any, code: Any, words: str
) -> None:
    path = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    found, answer, _ = server.ask("POST", path, body)
    error = answer["error"]
    assert (found, error["param"], error["code"]) == (status, param, code), error
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert server.ask("POST", "/v1/chat/completions", chat(FRANCE, max_tokens=1))[0] == 200


def test_a_key_is_asked_for_where_a_model_answers(server: Server, client: openai.OpenAI) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/invocations", "/nothing"):
        for key in ("Bearer wrong", "", KEY):
            status, answer, headers = server.ask("GET", path, Authorization=key)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert "bearer" in headers["www-authenticate"].lower()
    for path in ("/", "/health", "/ready", "/ping", "/metrics"):
        assert server.ask("GET", path, Authorization="")[0] == 200
    assert server.ask("GET", "/nothing")[0] == 404
    assert [model.id for model in client.models.list()] == [CHAT, PROMPT]
    assert client.models.retrieve(PROMPT).id == PROMPT


def test_pages_of_other_sites_are_not_answered(server: Server) -> None:
    assert server.ask("GET", "/health", Host="localhost:1")[0] == 200
    assert server.ask("GET", "/health", Host="rebound.example:1")[0] == 403
    for origin, status in (
        ("http://localhost:3000", 200),
        ("https://a.example", 403),
        ("null", 403),
    ):
        assert server.ask("GET", "/health", Origin=origin)[0] == status


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    status, page, headers = server.ask("GET", "/")
    assert status == 200 and "<title>" in page
    assert not re.findall(r"https?://|(?:src|href)=", page)
    assert headers["content-security-policy"].startswith("default-src 'none'")


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_rows(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps(chat(STORY, n=44, max_tokens=1900, stream=True))
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    response = connection.getresponse()
    response.read(20)
    wait_until(lambda: server.figure("sequences_running") == 4)
    assert server.figure("sequences_waiting") == 40
    status, answer, headers = server.ask("POST", "/v1/chat/completions", chat(FRANCE))
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
    assert int(headers["retry-after"]) >= 1
    response.close()
    connection.close()
    wait_until(lambda: server.figure("sequences_running") == 0)
    assert server.figure("sequences_waiting") == 0
    assert server.ask("POST", "/v1/chat/completions", chat(FRANCE))[0] == 200


def test_a_client_that_waits_for_a_whole_answer_may_leave_too(server: Server) -> None:
    left = server.figure("requests_total", status=499)
    tokens = server.figure("generated_tokens_total")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        no_end = {str(token): -100 for token in (0, 2)}
        body = json.dumps(chat(STORY, max_tokens=1900, logit_bias=no_end))
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost"]
        head += [f"Authorization: Bearer {KEY}", f"Content-Length: {len(body)}"]
        connection.sendall("\r\n".join([*head, "", body]).encode())
        wait_until(lambda: server.figure("sequences_running") == 1)
        time.sleep(2)  # the prompt, and some tokens
    wait_until(lambda: server.figure("sequences_running") == 0)
    assert server.figure("requests_total", status=499) == left + 1
    assert 0 < server.figure("generated_tokens_total") - tokens < 1000  # and not all 1900


def test_24_clients_get_their_own_answers_beside_others_that_leave(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        question = [{"role": "user", "content": f"Repeat the number {number}{number}, please."}]
        stream = client.chat.completions.create(**chat(question, max_tokens=8), stream=True)
        pieces = []
        for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
            if number % 4 == 3 and len(pieces) == 2:
                stream.close()
                break
        return "".join(pieces)

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, range(24)))
    assert together == [ask(number) for number in range(24)]
    assert len(set(together)) > 12


def test_the_figures_count_what_was_answered(server: Server) -> None:
    names = ["requests_total", "prompt_tokens_total", "generated_tokens_total", "cache_hits_total"]
    names += ["time_to_first_token_seconds_count", "tokens_per_second_count"]
    before = [server.figure(name) for name in names]
    status, text, _ = server.ask("POST", "/v1/chat/completions", chat(FRANCE, stream=True))
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    grown = [server.figure(name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [1, 37, 16, 1, 1, 1]


def test_a_new_champion_is_served_and_no_request_is_dropped(
    packaged: Packaged, onnx: Path, tmp_path: Path
) -> None:
    copy_store(packaged.folder / "mlflow.db", tmp_path)
    project, alias = Project(tmp_path), "champion"
    client = project.client
    with tracking(project), mlflow.start_run():
        calling = with_template(onnx, tmp_path / "onnx", HERMES)
        [logged] = log_onnx(calling, 200, Interface.chat, tool_calls="hermes")
        next_one = mlflow.register_model(logged.uri, CHAT)
    overrides = f"model_uri=models:/{CHAT}@{alias} follow=true serve.follow_every_s=0.3".split()
    with serving(project, *overrides, "serve.timeout_s=60", SLM_API_KEY=KEY) as server:
        _, before, _ = server.ask("GET", "/v1/models")
        ended = threading.Event()

        def ask(number: int) -> set[int]:
            found = set()
            while not ended.is_set():
                found.add(server.ask("POST", "/v1/chat/completions", chat(FRANCE))[0])
            return found

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask, number) for number in range(3)]
            client.set_registered_model_alias(CHAT, alias, next_one.version)
            wait_until(lambda: server.ask("GET", "/v1/models")[1] != before)
            ended.set()
            assert [future.result() for future in asking] == [{200}] * 3
        [after] = server.ask("GET", "/v1/models")[1]["data"]
        assert after["logged_model"] == logged.model_id
        assert server.figure("model_info") == 1
        body = chat(FRANCE, tools=TOOLS, tool_choice="required")
        _, answer, _ = server.ask("POST", "/v1/chat/completions", body)
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "get_time", "arguments": "{}"}
        wait_until(lambda: any("the last answer of" in line for line in server.lines))
        stop_while_it_answers(server)


def stop_while_it_answers(server: Server) -> None:
    """What is under way arrives whole, what takes too long is told, and the exit code is 0."""
    with ThreadPoolExecutor(1) as pool:
        no_end = {str(token): -100 for token in (0, 2)}  # some CPUs' rounding ends it sooner
        body = chat(STORY, max_tokens=150, stream=True, logit_bias=no_end)
        answer = pool.submit(server.ask, "POST", "/v1/chat/completions", body)
        wait_until(lambda: server.figure("sequences_running") == 1)
        assert server.stop() == 0
        status, text, _ = answer.result()
    assert status == 200 and text.endswith("data: [DONE]\n\n") and text.count("data: ") > 100


def test_an_answer_that_takes_too_long_is_told_and_ctrl_c_is_130(
    packaged: Packaged, tmp_path: Path
) -> None:
    limits = ("serve.timeout_s=2", "serve.shutdown_s=0.2")
    champion = f"model_uri=models:/{CHAT}@champion"
    with (
        serving(packaged, champion, *limits, TMPDIR=str(tmp_path)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        body = chat(STORY, max_tokens=4000)
        status, answer, headers = server.ask("POST", "/v1/chat/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert headers["x-should-retry"] == "false"  # or the openai client would ask twice more
        streamed = {**body, "stream": True}
        _, text, _ = server.ask("POST", "/v1/chat/completions", streamed)
        last = json.loads(text.split("data: ")[-1])
        assert last["error"]["code"] == "timeout" and text.count("data: ") > 2
        wait_until(lambda: server.figure("sequences_running") == 0)
        stopped = pool.submit(server.ask, "POST", "/v1/chat/completions", streamed)
        wait_until(lambda: server.figure("sequences_running") == 1)
        assert server.stop(signal.SIGINT) == 130
        last = json.loads(stopped.result()[1].split("data: ")[-1])
        assert last["error"]["code"] == "server_stops"
    assert not list(tmp_path.glob("slm-*"))  # what it had downloaded


class Silent(ThreadingHTTPServer):
    """A tracking server that lists a file, and keeps whoever asks for anything else waiting."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Keeping)
        self.asked, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Keeping(BaseHTTPRequestHandler):
    server: Silent

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        files = [{"path": "MLmodel", "is_dir": False, "file_size": 5}]
        body = b"" if self.command == "HEAD" else json.dumps({"files": files}).encode()
        if self.command == "GET" and "path=" not in self.path:
            self.server.asked.set()
            self.server.ended.wait()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = answer


@pytest.mark.parametrize("uri", ["models:/a@b", "{url}/api/2.0/mlflow-artifacts/artifacts/model"])
def test_a_registry_that_never_answers_keeps_no_server_from_its_end(
    project: Project, tmp_path: Path, uri: str
) -> None:
    silent = Silent()
    url = f"http://127.0.0.1:{silent.server_port}"
    (tmp_path / "tmp").mkdir()
    environment = {"MLFLOW_REGISTRY_URI": url, "TMPDIR": str(tmp_path / "tmp")}
    overrides = f"model_uri={uri.format(url=url)}", "serve.shutdown_s=0.5"
    server = Server(project, *overrides, **environment)
    try:
        assert silent.asked.wait(60)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 20
        assert not list((tmp_path / "tmp").glob("slm-*"))
    finally:
        server.stop(signal.SIGKILL)
        silent.ended.set()
        silent.shutdown()


def test_the_checkpoints_model_answers_one_after_the_other(packaged: Packaged) -> None:
    path, name = "/v1/chat/completions", f"{MODEL}-transformers"
    with serving(packaged, f"model_uri=models:/{packaged.reference.model_id}") as server:
        asked = {"messages": FRANCE, "max_tokens": 8, "temperature": 0.01}
        status, answer, _ = server.ask("POST", path, asked)
        assert status == 200 and answer["model"] == name
        text = answer["choices"][0]["message"]["content"]
        assert "Paris" in text
        _, streamed, _ = server.ask("POST", path, {**asked, "stream": True})
        [chunk, done] = re.findall("data: (.+)", streamed)
        assert json.loads(chunk)["choices"][0]["delta"]["content"] and done == "[DONE]"
        refused: list[dict[str, Any]] = [
            *({"max_tokens": value} for value in (0, -1, "5", 2.5, True, 9000, 10**30)),
            *({"temperature": value} for value in (0, -1, "warm", 1e9)),
            *({"top_p": value} for value in (0, 2, "all")),
            *({"messages": value} for value in (None, [], "Hi", [{"role": "robot"}], [FRANCE])),
            {"messages": [{"role": "user", "content": "\ud800"}]},
            {"seed": 1},
            {"\ud800": 1},
        ]
        for wrong in refused:
            status, answer, _ = server.ask("POST", path, {**asked, **wrong})
            [field] = wrong
            param = field.replace("\ud800", r"\ud800")  # half a surrogate pair
            assert (status, answer["error"]["param"]) == (400, param), answer
        with ThreadPoolExecutor(70) as pool:
            ask: Callable[[str], Any] = partial(
                server.ask, "POST", body={"messages": STORY, "max_tokens": 900}, **JSON
            )
            many = [pool.submit(ask, path) for _ in range(70)]  # of which 65 have a place
            wait_until(lambda: any(future.done() for future in many))
            status, answer, headers = next(future for future in many if future.done()).result()
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert headers["retry-after"] and ask("/invocations")[0] == 429
            server.stop(signal.SIGKILL)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model_uri=models:/nothing@champion"], "models:/nothing@champion names no version"),
        (["model_uri="], "model_uri is missing"),
        (["model_uri=a", "port=70000"], "port is 70000"),
        (["model_uri=a", "serve.timeout_s=0"], "serve.timeout_s is 0"),
        (
            ["model_uri=a", "serve.settings={threds: 1}"],
            "serve.settings has threds; valid: threads",
        ),
        (["model_uri=a", "serve.settings={top_p: 2}"], "serve.settings: top_p is 2"),
        (["model_uri=a", "serve.settings={execution_provider: gpu}"], "must be one of cpu, cuda"),
        (["model_uri=a", "serve.host=203.0.113.1"], "serve.host=203.0.113.1 port=0 cannot be"),
    ],
)
def test_what_keeps_a_server_from_starting_is_told(
    packaged: Packaged, overrides: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        packaged.call("serve", "port=0", *overrides)


def test_a_blank_key_is_refused(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLM_API_KEY", " ")
    with pytest.raises(InputError, match="SLM_API_KEY is set, and holds no key"):
        packaged.call("serve", "port=0", "model_uri=models:/nothing@champion")


def test_an_unsigned_model_is_not_served_where_a_key_is_configured(
    packaged: Packaged, tmp_path: Path
) -> None:
    key = f"signing.public_key={write_keys(tmp_path, 'own').public_key}"
    with pytest.raises(StepError, match="it has no model.sig"):
        packaged.call("serve", "port=0", f"model_uri=models:/{CHAT}@champion", key)
