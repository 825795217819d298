"""`serve`: the registered champions behind one server, asked by the openai client and by hand."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from slm.config import ROOT
from tests.conftest import MODEL, TARGET, Packaged, Project

CHAT, PROMPT = (f"{MODEL}-{TARGET}-{interface}" for interface in ("chat", "prompt"))
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
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
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = "json" in response.headers["content-type"] and text.strip()
        return response.status, json.loads(text) if is_json else text, dict(response.headers)

    def figure(self, name: str) -> float:
        """A figure of the chat model at /metrics."""
        _, text, _ = self.ask("GET", "/metrics")
        found = re.findall(rf'^slm_{name}{{model="{CHAT}".*}} (.+)$', text, re.MULTILINE)
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
    uris = f"model_uri=[models:/{CHAT}@champion,models:/{PROMPT}@champion]"
    settings = "serve.settings={max_batch_size: 4, max_queue_size: 40, context_length: 2048}"
    with serving(packaged, uris, settings) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0)


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_openai_client_streams_what_it_would_get_whole(client: openai.OpenAI) -> None:
    asked: Any = {"model": CHAT, "messages": FRANCE, "max_tokens": 16, "temperature": 0}
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
