"""Load a server of `serve` as clients do, and hold it against `predict` and peers.

    make bench-serve
    python -m bench.serve --seconds 30 --peer llama.cpp=http://127.0.0.1:9000/v1
    python -m bench.serve --soak 600 --clients 32

Closed loop (each client asks again when answered) and open loop (requests come at a rate), all
streamed. `--soak` asks for so many seconds with faults among the requests, and fails if an answer
is lost or another's, or if the process's own memory grows (keys and values are in shared maps,
which fill up to their bound). Writes `--out`, and a plot beside it.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from rich.console import Console

from bench.__main__ import Worker, machine, ratio, report
from bench.export import mb_of
from bench.load import Seen, ask, closed_loop, figures, open_loop, post
from slm.config.common import ROOT, user_cache
from slm.evaluation.summary import table
from slm.running.tracking import settle_tracking

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = 48  # of an answer
CONTEXT = 2048
SUBJECTS = ["rivers", "trains", "bread", "winter", "music", "glass", "horses", "maps"]
QUESTIONS = len(SUBJECTS) ** 2
LONG = "The quick brown fox jumps over the lazy dog. "  # ten tokens
# Of a soak: so that keys, values and cache soon take up all they may.
SMALL, SMALL_ROWS = 1024, 8
SMALL_SETTINGS = f"{{context_length: {SMALL}, max_batch_size: {SMALL_ROWS}, cache_mb: 64}}"
GROWTH_MB = 60  # of memory, over the second half of a soak: what MLflow and the allocator may keep


@contextlib.contextmanager
def served(uri: str, settings: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server of its own on a free port: its URL, and its process."""
    command = [sys.executable, "-m", "steps.serve", f"model_uri={uri}", "port=0"]
    command += [f"serve.settings={settings}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url, lines = "", []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"listening at (\S+)", line):
                url = f"{found[1]}/v1"
            if "ready:" in line:
                break
        else:
            raise RuntimeError("".join(lines))
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stderr.close()


def question(number: int, model: str, tokens: int = TOKENS, words: str = "") -> dict[str, Any]:
    """One of QUESTIONS conversations; others with `words` before."""
    first, second = divmod(number % QUESTIONS, len(SUBJECTS))
    text = f"{words}Write about {SUBJECTS[first]} and {SUBJECTS[second]}."
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}


async def loads(url: str, model: str, seconds: float) -> dict[str, dict[str, float]]:
    """The figures of every load, by its name."""
    numbers = itertools.count()  # over all loads, so that no prompt was asked before

    async def short(_: int) -> Seen:
        number = next(numbers)
        return await ask(url, question(number, model, words=f"Letter {number}. "))

    async def long(_: int) -> Seen:
        number = next(numbers)
        return await ask(url, question(number, model, 8, f"{number} {LONG * 150}"))

    await closed_loop(2, min(3, seconds), short)
    results = {}
    for clients in CLIENTS:
        name = f"{clients} client" + "s" * (clients > 1)
        results[name] = figures(await closed_loop(clients, seconds, short))
        report(f"{name}: {results[name]}")
    most = max(result["tokens_per_s"] for result in results.values())
    for share in (0.5, 0.8):
        rate, rng = share * most / TOKENS, random.Random(0)
        waits = [rng.expovariate(rate) for _ in range(round(2 * rate * seconds))]
        name = f"open loop, {share:.0%} of the most"
        results[name] = figures(await open_loop(waits, seconds, short))
        report(f"{name}: {results[name]}")
    # Fairness: what short requests see of one long prompt after the other beside them.
    beside = await asyncio.gather(closed_loop(7, seconds, short), closed_loop(1, seconds, long))
    names = "7 clients beside one with long prompts", "the one with long prompts"
    results |= zip(names, map(figures, beside), strict=True)
    return results


async def soak(
    url: str, model: str, clients: int, seconds: float, process: psutil.Process
) -> dict[str, Any]:
    """What came of `seconds` of requests, some of them with faults; `wrong` should be empty."""
    rng, kinds, wrong = random.Random(1), Counter[str](), list[str]()
    memory: list[float] = []
    expected: dict[int, str] = {}

    async def right(number: int) -> Seen:
        return await ask(url, question(number, model, 16))

    async def learn(numbers: Iterator[int]) -> None:
        for number in numbers:
            expected[number] = (await right(number)).text

    # Every row takes up what memory it may, so that more is a leak.
    stories = (question(i, model, SMALL - 100, "At length: ") for i in range(SMALL_ROWS))
    await asyncio.gather(*(ask(url, story) for story in stories))
    numbers = iter(range(QUESTIONS))
    await asyncio.gather(*(learn(numbers) for _ in range(8)))

    async def request(number: int) -> Seen:
        chance = rng.random()
        kind = next(name for name, below in FAULTS.items() if chance < below)
        kinds[kind] += 1
        if kind == "leaves":
            seen = await ask(url, question(number, model, 16), leave_after=rng.randint(0, 12))
            if not expected[number % QUESTIONS].startswith(seen.text):
                wrong.append(f"{kind} {number}: {seen.text!r}")
        elif kind == "bad body":
            body = rng.choice([b"{", b"[]", b'{"messages": 5}', b'{"messages": [], "x": 1}', b""])
            parts = [part async for part in post(url, "/chat/completions", body)]
            seen = Seen(status=int(parts[0]))
            if seen.status != 400 or b'"error"' not in b"".join(parts):
                wrong.append(f"{kind} {body!r}: {parts!r}")
        elif kind == "at the limit":
            words = LONG * (SMALL // 10 - 20)
            room = SMALL - await prompt_tokens(url, question(number, model, 1, words))
            over, fits = rng.choice([(True, room + 1), (False, room)])
            seen = await ask(url, question(number, model, fits, words))
            if seen.status != (400 if over else 200) or (not over and not seen.ended):
                wrong.append(f"{kind} {fits}: {seen.status} {seen.error}")
        else:
            seen = await right(number)
            if not seen.ended or seen.text != expected[number % QUESTIONS]:
                wrong.append(f"{number}: {seen.status} {seen.error} {seen.text!r}")
        return seen

    async def watch() -> None:
        while True:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(mb_of(status, "RssAnon"))
            await asyncio.sleep(max(seconds / 200, 0.2))

    watching = asyncio.ensure_future(watch())
    await closed_loop(clients, seconds, request)
    watching.cancel()
    half = memory[len(memory) // 2 :]
    grown = max(half) - half[0]
    memory_mb = [half[0], max(half)]
    return {"kinds": dict(kinds), "wrong": wrong, "memory_mb": memory_mb, "grown_mb": grown}


# Kinds of requests, and the chance below which one is of the kind.
FAULTS = {"leaves": 0.10, "bad body": 0.15, "at the limit": 0.16, "right": 1.0}


async def prompt_tokens(url: str, body: dict[str, Any]) -> int:
    parts = [part async for part in post(url, "/chat/completions", json.dumps(body).encode())]
    return json.loads(b"".join(parts[1:]))["usage"]["prompt_tokens"]


def against_predict(
    uri: str, url: str, model: str, rounds: int, process: psutil.Process
) -> dict[str, list[dict[str, float]]]:
    """What 16 threads that call `predict` get, and 16 clients, whole and streamed, in turns."""
    measured: dict[str, list[dict[str, float]]] = {"predict": [], "whole": [], "streamed": []}
    if not rounds:
        return measured
    with contextlib.closing(Worker("threads", uri)) as threads:
        for number in range(rounds + 1):
            for name, found in measured.items():
                if name == "predict":
                    figure = threads.measure()
                else:
                    before = sum(process.cpu_times()[:2])
                    tokens, seconds = asyncio.run(clients_16(url, model, name == "streamed"))
                    cpu_s = sum(process.cpu_times()[:2]) - before
                    figure = {"tokens_per_s": tokens / seconds, "cpu_ms": 1000 * cpu_s / tokens}
                if number:  # the first round warms up
                    found.append(figure)
                    report(f"16 at once, {name}: {figure}")
    return measured


async def clients_16(url: str, model: str, streamed: bool) -> tuple[int, float]:
    """Tokens and seconds of 16 clients with four requests each, as bench/workers.py's threads."""

    async def whole(number: int) -> int:
        if streamed:
            return (await ask(url, question(number, model))).tokens
        data = json.dumps(question(number, model)).encode()
        parts = [part async for part in post(url, "/chat/completions", data)]
        return json.loads(b"".join(parts[1:]))["usage"]["completion_tokens"]

    async def client(first: int) -> int:
        return sum([await whole(number) for number in range(first, first + 4)])

    start = time.monotonic()
    tokens = sum(await asyncio.gather(*(client(4 * i) for i in range(16))))
    return tokens, time.monotonic() - start


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Throughput and time to first token by clients, a line for each server."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, loaded in results.items():
        found = [result for key, result in loaded.items() if re.match(r"\d+ clients?$", key)]
        clients = CLIENTS[: len(found)]
        axes[0].plot(clients, [r.get("tokens_per_s", 0) for r in found], "o-", label=name)
        axes[1].plot(clients, [r.get("ttft_ms_p95", 0) for r in found], "o-", label=name)
    for axis, words in zip(axes, ("tokens/s", "time to first token, p95 (ms)"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="clients", title=words, xticks=CLIENTS, xticklabels=CLIENTS, ylim=(0, None))
    axes[1].set_yscale("symlog", linthresh=100)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "models:/smollm2-135m-instruct-cpu-int4-rtn-block-32-acc-level-4-chat@champion"
    parser.add_argument("--uri", default=default)
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--rounds", type=int, default=5, help="against predict; 0 leaves it out")
    parser.add_argument("--peer", action="append", default=[], help="name=URL of its /v1")
    parser.add_argument("--soak", type=float, default=0, help="seconds; nothing else is measured")
    parser.add_argument("--clients", type=int, default=32, help="of a soak")
    parser.add_argument("--out", type=Path, default=Path(user_cache()) / "bench-serve.json")
    arguments = parser.parse_args()
    settle_tracking()
    settings = SMALL_SETTINGS if arguments.soak else f"{{context_length: {CONTEXT}}}"
    with served(arguments.uri, settings) as (url, process):
        model = json.load(urlopen(f"{url}/models"))["data"][0]["id"]
        if arguments.soak:
            found = asyncio.run(soak(url, model, arguments.clients, arguments.soak, process))
            print(json.dumps(found, indent=2))
            sys.exit(bool(found["wrong"]) or found["grown_mb"] > GROWTH_MB)
        speeds = against_predict(arguments.uri, url, model, arguments.rounds, process)
        results = {"serve": asyncio.run(loads(url, model, arguments.seconds))}
    for peer in arguments.peer:
        name, _, url = peer.partition("=")
        report(f"peer {name}")
        model = json.load(urlopen(f"{url}/models"))["data"][0]["id"]
        results[name] = asyncio.run(loads(url, model, arguments.seconds))
    record = {"machine": machine(), "loads": results, "against_predict": speeds}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    plot(results, arguments.out.with_suffix(".png"))
    show(results, speeds)
    report(f"every figure is in {arguments.out}")


def show(
    results: dict[str, dict[str, dict[str, float]]], speeds: dict[str, list[dict[str, float]]]
) -> None:
    names = ["requests", "failed", "tokens_per_s", "ttft_ms_p50", "ttft_ms_p95", "ttft_ms_p99"]
    names.append("inter_token_ms_p95")
    columns = {"load": "left", **dict.fromkeys(names, "right")}
    console = Console(width=140, highlight=False)
    for server, loaded in results.items():
        rows = [
            [load, *(f"{result.get(name, 0):,.0f}" for name in names)]
            for load, result in loaded.items()
        ]
        console.print(table(server, columns, rows))
    for name in ("whole", "streamed") if speeds["predict"] else ():
        speed = ratio(speeds[name], speeds["predict"], "tokens_per_s")
        cost = ratio(speeds[name], speeds["predict"], "cpu_ms")
        words = f"16 clients, {name}: {speed:.3f} of the tokens/s of predict from 16 threads"
        console.print(f"{words} (>= 0.97), {cost:.3f} of its CPU time for a token")


if __name__ == "__main__":
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    main()
