"""`serve` from within: what it does where a model, a client or the registry fails it.

The server runs in this process, so that a test can make the real model fail.
"""

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import transformers
import uvicorn
from fastapi.responses import PlainTextResponse

from slm.config.packaging import Interface
from slm.serving import follow, models, run
from slm.serving.connection import Connection
from slm.serving.follow import Follower
from slm.serving.models import Served, load
from slm.serving.one_by_one import OneByOne
from slm.serving.service import Service
from tests.conftest import Packaged, Project, composed, copy_store, folder_of, log_onnx, tracking
from tests.test_serve import CHAT, FRANCE, JSON, PROMPT, STORY, Server, chat, wait_until

pytestmark = pytest.mark.xdist_group("serve")  # its fixtures once, not in every process

ROUTE = "/v1/chat/completions"


class Uncalled(run.Server):
    """The server outside the main thread, where no signal can be heeded."""

    capture_signals = contextlib.nullcontext  # type: ignore[assignment]


class Here(Server):
    """The server in a thread of this process, without what loads, follows and heeds signals."""

    def __init__(self, loaded: list[Served], *overrides: str) -> None:
        self.service = Service(composed(*overrides).serve)
        self.server = Uncalled(run.options_of(self.service), self.service)
        self.listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that it is soon full where a client does not read; connections inherit it.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.port = self.listener.getsockname()[1]
        for served in loaded:
            self.service.add(served)

    def run(self) -> None:
        asyncio.run(self.server.serve([self.listener]))

    def in_loop(self, call: Callable[[], None]) -> None:
        assert self.service.courier is not None
        self.service.courier.loop.call_soon_threadsafe(call)


@contextlib.contextmanager
def running(loaded: list[Served], *overrides: str) -> Iterator[Here]:
    here = Here(loaded, *overrides)
    thread = threading.Thread(target=here.run)
    thread.start()
    try:
        yield here
    finally:
        here.server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def loaded(packaged: Packaged) -> list[Served]:
    """Both champions, which share their weights."""
    with tracking(packaged):
        settings = composed(
            "serve.settings={max_tokens: 7, execution_provider: cpu}"
        ).serve.settings
        uris = [f"models:/{name}@champion" for name in (CHAT, PROMPT)]
        return [load(uri, composed().signing, settings) for uri in uris]


@pytest.fixture(scope="module")
def here(loaded: list[Served]) -> Iterator[Here]:
    with running(loaded) as here:
        yield here


def test_defaults_of_requests_and_the_provider_are_set_at_load(here: Here) -> None:
    body = {"messages": STORY}
    assert here.ask("POST", ROUTE, body)[1]["usage"]["completion_tokens"] == 7


def test_a_models_own_oserror_is_told_and_logged_once(
    here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(logging.getLogger("slm"), "propagate", True)
    decoder = here.service.models[CHAT].runtime.scheduler.decoder
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "step", fail)
        status, answer, _ = here.ask("POST", ROUTE, chat(FRANCE))
        _, streamed, _ = here.ask("POST", ROUTE, chat(FRANCE, stream=True))
    assert status == 500 and "Cannot allocate memory" in answer["error"]["message"]
    assert json.loads(streamed.split("data: ")[-1])["error"] == answer["error"]
    failed = [record for record in caplog.records if record.exc_info]
    assert len(failed) == 2 and failed[0].getMessage() == f"{ROUTE}: {CHAT} failed"
    assert "capital of France" not in caplog.text
    assert here.ask("POST", ROUTE, chat(FRANCE))[0] == 200


def test_a_client_that_leaves_before_its_body_is_here_is_no_fault(
    here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("slm"), "propagate", True)
    with socket.create_connection(("127.0.0.1", here.port)) as connection:
        connection.sendall(f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\n".encode())
        connection.sendall(b"Content-Length: 100\r\n\r\n{")
        wait_until(lambda: bool(here.server.server_state.tasks))
    wait_until(lambda: not here.server.server_state.tasks)
    assert not caplog.records


@pytest.mark.parametrize("stops", [False, True])
def test_a_client_that_does_not_read_holds_no_row_for_ever(
    loaded: list[Served], stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = loaded[0].runtime.scheduler
    monkeypatch.setattr("slm.serving.connection.STALLED_S", 600.0 if stops else 2.0)
    with running(loaded) as here, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", here.port))
        fields: Any = {"n": 16, "logprobs": True, "top_logprobs": 20, "stream": True}
        body = json.dumps(chat(STORY, max_tokens=1900, **fields))
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        connections: Any = here.server.server_state.connections
        wait_until(lambda: any(one.flow.write_paused for one in connections))
        start = time.monotonic()
        if stops:
            here.in_loop(here.server.end_requests)
        wait_until(lambda: not scheduler.open and not connections)
        assert time.monotonic() - start < 20


def test_the_checkpoints_model_ends_at_its_context_or_with_its_client(lettered: Path) -> None:
    pipeline = transformers.pipeline("text-generation", str(lettered))
    config, said = pipeline.model.config, SimpleQueue[Any]()
    ask = partial(pipeline, "abc", max_new_tokens=10**6, eos_token_id=-1, return_tensors=True)
    queue = OneByOne(SimpleNamespace(get_raw_model=lambda: pipeline))
    place = queue.queue(ask, said)
    wait_until(lambda: queue.place is place)
    place.cancel()
    _, [answer] = said.get(timeout=60)
    assert len(answer["generated_token_ids"]) < config.max_position_embeddings / 2
    queue.most_tokens = 96
    queue.queue(ask, said)
    _, [answer] = said.get(timeout=60)
    assert len(answer["generated_token_ids"]) == 96


@pytest.mark.parametrize(("pause_s", "whole"), [(0.1, True), (6.0, False)])
def test_a_client_that_reads_slowly_gets_all_unless_it_stalls(pause_s: float, whole: bool) -> None:
    answer = PlainTextResponse("x" * 8_000_000)
    own = type("Impatient", (Connection,), {"patience_s": 2.0, "limit_s": 600.0})
    server = uvicorn.Server(uvicorn.Config(answer, http=own, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(listener.getsockname())
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(200_000, socket.MSG_WAITALL):
                read += len(piece)
                time.sleep(pause_s)
                pause_s = pause_s if whole else 0
        server.should_exit = True
        thread.join(60)
    assert (read > 8_000_000) is whole


def test_invocations_have_an_end_too(loaded: list[Served]) -> None:
    with running(loaded, "serve.timeout_s=0.2") as here, ThreadPoolExecutor(1) as pool:
        no_end = {str(token): -100 for token in (0, 2)}
        body = chat(STORY, max_tokens=1900, logit_bias=no_end)
        path = f"/invocations?model={CHAT}"
        status, answer, headers = here.ask("POST", path, body, **JSON)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        here.service.settings.timeout_s = 600
        asked = pool.submit(here.ask, "POST", path, body, **JSON)
        wait_until(lambda: len(here.service.inboxes) == 1)
        here.in_loop(here.service.stop)
        status, answer, _ = asked.result()
        assert (status, answer["error"]["code"]) == (503, "server_stops")
        assert here.figure("requests_total") == 2


def test_the_figures_count_a_batch_once_and_each_choice(here: Here) -> None:
    names = ["tokens_per_second_count", "generated_tokens_total"]
    before = [here.figure(name) for name in names]
    assert here.ask("POST", ROUTE, chat(FRANCE, n=3, stream=True))[0] == 200
    grown = [here.figure(name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [3, 48]
    _, text, _ = here.ask("GET", "/metrics")
    assert len(re.findall("^slm_sequences_running{", text, re.MULTILINE)) == 1


def test_another_version_of_the_same_logged_model_is_counted(loaded: list[Served]) -> None:
    service = Service(composed().serve)
    again = [Served(CHAT, s.uri, s.model, s.pyfunc) for s in (loaded[0], loaded[0])]
    for served in again:
        service.add(served)
    assert f'slm_model_info{{model="{CHAT}"' in service.metrics.page().decode()


def test_files_last_as_long_as_the_weights_that_read_them(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(uri: str, parameter: str, made_by: str, into: Path) -> Path:
        source = next(f for f in mlflow_folders if uri in f[0])[1]
        return Path(shutil.copytree(source, into / "model", copy_function=os.link))

    names = {CHAT: "chat", PROMPT: "prompt"}
    client = packaged.client
    mlflow_folders = []
    for name, interface in names.items():
        version = client.get_model_version_by_alias(name, "champion").version
        [model] = [m for m in packaged.candidates.models if m.interface == interface]
        mlflow_folders.append((f"models:/{name}/{version}", folder_of(packaged, model)))
    monkeypatch.setattr(models, "local_path", downloaded)
    monkeypatch.setattr(models, "downloads", lambda: SimpleNamespace(name=str(tmp_path)))
    with tracking(packaged):
        settings, signing = {"cache_mb": 1}, composed().signing
        first, second = (load(f"models:/{n}@champion", signing, settings) for n in names)
    assert first.runtime is second.runtime and len(list(tmp_path.iterdir())) == 2
    first.replace()
    assert len(list(tmp_path.iterdir())) == 2
    assert second.runtime.tokenizer.guide and second.runtime.tokenizer.template
    second.replace()
    wait_until(lambda: gc.collect() >= 0 and not list(tmp_path.iterdir()))


def test_a_version_that_fails_leaves_the_old_one_and_is_tried_again(
    packaged: Packaged, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_store(packaged.folder / "mlflow.db", tmp_path)
    project = Project(tmp_path)
    with tracking(project), mlflow.start_run():
        [logged] = log_onnx(onnx, 250, Interface.chat)
        version = str(mlflow.register_model(logged.uri, CHAT).version)
    [weights] = folder_of(project, logged).rglob("genai_config.json")
    weights.rename(weights.with_suffix(".away"))
    monkeypatch.setattr(follow, "TRIES_AGAIN_S", 0.2)
    service, config = Service(composed().serve), composed("serve.follow_every_s=0.1")

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.05)

    def failures() -> float:
        return service.metrics.failures.labels(CHAT)._value.get()

    async def following() -> None:
        old = load(f"models:/{CHAT}@champion", config.signing, {})
        service.add(old)
        task = asyncio.create_task(Follower(service, config).follow([old]))
        project.client.set_registered_model_alias(CHAT, "champion", version)
        await until(lambda: failures() >= 2)
        assert service.models[CHAT] is old
        old.answer()
        weights.with_suffix(".away").rename(weights)
        await until(lambda: service.models[CHAT].version == version)
        assert service.models[CHAT].model.model_id == logged.model_id
        task.cancel()

    with tracking(project):
        asyncio.run(following())


def test_a_failed_version_holds_back_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        SimpleNamespace(
            name=name, uri=f"models:/{name}@x", version="2", model=SimpleNamespace(uri="")
        )
        for name in ("chat", "prompt")
    ]
    service, asked, away = Service(composed().serve), [], [True]

    def pinned(uri: str) -> tuple[str, str]:
        if away.pop() if away else False:
            raise ConnectionError("the registry is away")
        return uri, "3"

    def next_of(served: Any) -> None:
        asked.append(served.name)
        raise ValueError("broken")

    async def look_twice() -> None:
        follower: Any = Follower(service, composed())
        monkeypatch.setattr(follower, "next", next_of)
        for served in both * 2:
            await follower.look(served)

    monkeypatch.setattr(follow, "pinned_uri", pinned)
    asyncio.run(look_twice())
    assert asked == ["prompt", "chat"]  # the chat's first look met no registry
