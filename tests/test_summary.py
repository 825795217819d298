"""How a command ends: its exit code, the summary for machines, and the webhook."""

import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from slm.config import Config
from slm.errors import InputError, StepError, ToldError, UnreachableError, VerdictError
from slm.records import RegisteredVersion, Registration
from slm.running import summary
from slm.running.command import entry_point
from slm.running.summary import Summary, note_step

VERSION = RegisteredVersion("tiny-chat", "2", "champion")


def failing(error: BaseException) -> Callable[[Config], object]:
    def step(_: Config) -> object:
        raise error

    return step


def registering(_: Config) -> None:
    registration = Registration("models:/tiny-chat@champion", "passed", [VERSION], True)
    note_step("register", registration, 1.5, "never made", "run-1")


def ended(
    step: Callable[[Config], object], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> int:
    """The exit code of a step as a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["/steps/fetch.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    logger = logging.getLogger("slm")
    for name in ("handlers", "level", "propagate"):  # as they are, once the test has ended
        monkeypatch.setattr(logger, name, getattr(logger, name))
    with pytest.raises(SystemExit) as raised:
        entry_point(step)
    summary.CURRENT.set(None)
    return int(raised.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StepError("it cannot"), 1),
        (ZeroDivisionError("nobody expected it"), 1),
        (InputError("no such folder"), 2),
        (VerdictError("perplexity_ratio is 9"), 3),
        (ToldError("register failed: perplexity_ratio is 9", 3), 3),
        (UnreachableError("the model hub cannot be reached"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (PermissionError("/sys/nowhere"), 4),
        (MlflowException("API request to http://host failed"), 4),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_has_its_exit_code_and_is_in_the_summary(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "summary.json"
    assert ended(failing(error), monkeypatch, f"summary={file}") == code
    found = json.loads(file.read_text())
    assert found["exit_code"] == code and str(error)[:20] in found["error"]
    assert found["status"] == ("interrupted" if code == 130 else "failed")
    assert found["model"] == "smollm2-135m-instruct" and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=phi-9", "summary={}"],
        ["--overrides", '["model=phi-9", "summary={}"]'],
        ["--model", "phi-9", "--json", "{}"],
        ["--colour", "red", "--overrides", "model.name=a summary='{}'"],
    ],
)
def test_what_cannot_be_composed_is_bad_input_and_in_the_summary(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    file.write_text("of an earlier run")
    assert ended(registering, monkeypatch, *(a.format(file) for a in arguments)) == 2
    assert json.loads(file.read_text())["exit_code"] == 2


def test_a_step_that_is_none_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(registering, monkeypatch, "force=fetch,exports") == 2


def test_the_summary_says_what_was_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(registering, monkeypatch, "--summary", str(tmp_path / "summary.json")) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["status"], found["verdict"], found["schema"]) == ("done", "passed", 1)
    assert found["registered"] == [{"name": "tiny-chat", "version": "2", "alias": "champion"}]
    assert found["steps"]["register"]["duration_s"] == 1.5


def test_nothing_changed_is_said_only_of_what_reused_everything() -> None:
    told = Summary("main")
    assert told.status == "done"
    told.steps = {"fetch": summary.Done("/a", 1.0, True, "", "1")}
    assert told.status == "unchanged"
    told.steps["export_onnx"] = summary.Done("/b", 1.0, False, "never made", "2")
    assert told.status == "done"


class Receiver(HTTPServer):
    """A webhook: keeps what is posted, and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.status = 200

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(json.loads(body))
        self.send_response(self.server.status)
        self.end_headers()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("slack", ["no", "by host", "by format"])
def test_the_webhook_gets_the_summary_in_the_form_that_it_reads(
    slack: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(summary.WEBHOOK, f"http://{receiver.host}/services/T0/secret")
    if slack == "by host":
        monkeypatch.setattr(summary, "SLACK", receiver.host)
    elif slack == "by format":
        monkeypatch.setenv(summary.FORMAT, "slack")
    assert ended(failing(VerdictError("too far off")), monkeypatch) == 3
    [body] = receiver.bodies
    if slack == "no":
        assert body["exit_code"] == 3 and body["entry_point"] == "fetch"
    else:
        assert list(body) == ["text"] and "failed (exit code 3); too far off" in body["text"]


@pytest.mark.parametrize("wrong", ["refuses", "down", "no URL", "no host"])
def test_a_webhook_that_fails_is_a_warning_without_its_secret(
    wrong: str,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    receiver.status = 500
    urls = {
        "refuses": f"http://user:secret@{receiver.host}/secret",
        "down": "http://127.0.0.1:9/secret",
        "no URL": "secret",
        "no host": "http:///sec ret/secret",
    }
    monkeypatch.setenv(summary.WEBHOOK, urls[wrong])
    assert ended(registering, monkeypatch) == 0
    said = capsys.readouterr().err
    assert "the webhook at" in said and "secret" not in said


def test_what_a_command_starts_has_no_webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each step of main would post as well."""
    found: list[bool] = []

    def step(_: Config) -> None:
        found.append(summary.WEBHOOK in os.environ)

    monkeypatch.setenv(summary.WEBHOOK, "http://127.0.0.1:9/secret")
    assert ended(step, monkeypatch) == 0
    assert found == [False]
