"""How a command ended, for machines: a JSON file, and the same to a webhook.

    python -m steps.main summary=outcome.json
    SLM_WEBHOOK_URL=https://hooks.slack.com/services/… mlflow run . --env-manager local

docs/unattended.md has the fields.
"""

import contextlib
import dataclasses
import http.client
import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slm.errors import InfrastructureError, InputError
from slm.records import Evaluation, RegisteredVersion, Registration
from slm.redaction import redacted, redacted_texts
from slm.running.whole import write_whole

log = logging.getLogger("slm.summary")

WEBHOOK, FORMAT = "SLM_WEBHOOK_URL", "SLM_WEBHOOK_FORMAT"
FORMATS = ("", "json", "slack")
SLACK = "hooks.slack.com"
PATIENCE_S = 10
INTERRUPTED = 130
# Exit codes, the worst last: of several jobs, the command exits with the worst of theirs.
BY_WEIGHT = (0, 3, 4, 2, 1, INTERRUPTED)


@dataclass(frozen=True)
class Done:
    """A step that ended: its outcome's URI, why it was made (or reused), and its MLflow run."""

    uri: str
    duration_s: float
    reused: bool
    why: str
    run_id: str


@dataclass
class Summary:
    """What a command did so far; `result` is what plan, clean, rollback and score end with.

    `metrics` are the candidate's. A command that does its work several times, for several targets
    say, has a summary of each among its `jobs`; `label` is what tells one from the others.
    """

    entry_point: str
    label: str = ""
    exit_code: int = 0
    error: str = ""
    model: str = ""
    target: str = ""
    run_id: str = field(default_factory=lambda: os.environ.get("MLFLOW_RUN_ID", ""))
    tracking_uri: str = ""
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    duration_s: float = 0.0
    verdict: str = ""
    reasons: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    registered: list[RegisteredVersion] = field(default_factory=list)
    steps: dict[str, Done] = field(default_factory=dict)
    result: Any = None
    jobs: list["Summary"] = field(default_factory=list)

    @property
    def status(self) -> str:
        """done, unchanged (every outcome was reused), failed or interrupted."""
        if self.exit_code:
            return "interrupted" if self.exit_code == INTERRUPTED else "failed"
        steps = [step for told in (self, *self.jobs) for step in told.steps.values()]
        return "unchanged" if steps and all(step.reused for step in steps) else "done"

    def fields(self) -> dict[str, Any]:
        """All of it, with the status of each job."""
        own = dataclasses.asdict(self) | {"jobs": [job.fields() for job in self.jobs]}
        return {"status": self.status, **own}

    def json(self) -> str:
        every = redacted_texts({"schema": 1, **self.fields()})
        return json.dumps(every, indent=2, default=str) + "\n"

    def sentence(self) -> str:
        """All of it in a line for people."""
        of = f" of {self.model} for {self.target}" if self.model else ""
        how = f"{self.status} (exit code {self.exit_code})" if self.exit_code else self.status
        versions = [f"{v.name} version {v.version} {v.alias}".strip() for v in self.registered]
        jobs = [f"{job.label} {job.verdict or job.status}" for job in self.jobs]
        told = [self.error, self.verdict and f"verdict {self.verdict}", *jobs, *versions]
        return redacted(f"{self.entry_point}{of}: {'; '.join([how, *filter(None, told)])}")


# That of the command which this process runs; none in tests.
CURRENT: ContextVar[Summary | None] = ContextVar("summary", default=None)


def note(**facts: Any) -> None:
    """Say something of the command that runs, by fields of Summary."""
    if (summary := CURRENT.get()) is not None:
        for name, value in facts.items():
            setattr(summary, name, value)


def note_step(name: str, outcome: Any, duration_s: float, why: str, run_id: str) -> None:
    """Say that a step ended, what an evaluation or a registration came to; `why` as Kept has it."""
    if (summary := CURRENT.get()) is None:
        return
    summary.steps[name] = Done(outcome.uri, round(duration_s, 3), not why, why, run_id)
    if isinstance(outcome, (Evaluation, Registration)):
        summary.verdict, summary.reasons = outcome.verdict, outcome.reasons
    if isinstance(outcome, Evaluation):
        measured = outcome.candidate_metrics
        summary.metrics = {k: v for k, v in measured.items() if math.isfinite(v)}
    if isinstance(outcome, Registration):
        summary.registered = outcome.versions


@contextlib.contextmanager
def job() -> Iterator[Summary]:
    """A summary of its own for a part of the command's work, which the command's one then holds."""
    whole = CURRENT.get()
    own = Summary(whole.entry_point if whole else "", run_id="")
    own.tracking_uri = whole.tracking_uri if whole else ""
    token, start = CURRENT.set(own), time.monotonic()
    try:
        yield own
    finally:
        CURRENT.reset(token)
        own.duration_s = round(time.monotonic() - start, 3)
        if whole:
            whole.jobs.append(own)


def worst(exit_codes: Iterable[int]) -> int:
    """The exit code of a command whose jobs ended with these; one that is unknown is a fault."""
    return max(exit_codes, key=lambda c: BY_WEIGHT.index(c if c in BY_WEIGHT else 1), default=0)


class Ending:
    """The end of a command: its summary, where that goes, and when it began."""

    def __init__(self, entry_point: str) -> None:
        self.summary, self.path = Summary(entry_point), ""
        self.start, self.began = time.monotonic(), False
        # Taken out of the environment: what this process starts has an end of its own.
        self.webhook = os.environ.pop(WEBHOOK, "")
        self.format = os.environ.pop(FORMAT, "")
        CURRENT.set(self.summary)

    def goes_to(self, file: str | None, folder: Path) -> None:
        """Say where it is written, and remove an earlier command's: it says nothing of this one.

        Raises InputError if no file can be there, or if the webhook's form is unknown.
        """
        self.began = True
        if file:
            path = folder / Path(file).expanduser()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(
                    f"summary={file} cannot be written ({error}). Give a file in a folder that you "
                    "may write to."
                ) from error
            self.path = str(path)
        if self.format not in FORMATS:
            raise InputError(
                f"{FORMAT} is {self.format!r}; it must be {' or '.join(FORMATS[1:])}, or not set."
            )

    def tell(self) -> None:
        """Write the file, and post to the webhook; nothing of a command that only showed help."""
        if not (self.began or self.summary.exit_code):
            return
        self.summary.duration_s = round(time.monotonic() - self.start, 3)
        try:
            if self.path:
                write_whole(Path(self.path), self.summary.json())
        except OSError as error:
            log.error("the summary cannot be written: %s", error)
            self.summary.exit_code = self.summary.exit_code or InfrastructureError.exit_code
        if self.webhook:
            post(self.summary, self.webhook, self.format)


def post(summary: Summary, url: str, form: str) -> None:
    """POST the summary as JSON, or in Slack's form; a webhook that fails is a warning.

    The URL is a secret: no more of it than its host is shown.
    """
    host = url.partition("://")[2].split("/")[0].rpartition("@")[2]
    slack = form == "slack" or (form != "json" and host == SLACK)
    text = json.dumps({"text": summary.sentence()}) if slack else summary.json()
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, text.encode(), headers, method="POST")
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError as error:
        log.warning("the webhook at %s refuses the summary: %d", host, error.code)
    except (OSError, ValueError, http.client.HTTPException) as error:  # may hold the URL
        reason = getattr(error, "reason", error)
        log.warning("the webhook at %s was not reached: %s", host, type(reason).__name__)
