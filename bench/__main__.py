"""Measure the packaged models against a bare loop, the checkpoint and peers, on this machine.

    make bench
    python -m bench --rounds 10 --gguf smollm2.gguf --peers-python peers/bin/python

Each figure is the median of rounds in which the workers take turns, each ratio the median of the
rounds' ratios. Prints a table, and writes `--out` with every round and the machine's description.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import mlflow
from rich.console import Console

from bench.server import serving
from bench.workers import ASKING, DRAFTED, LONG
from slm.config.common import ROOT, user_cache
from slm.evaluation.summary import table
from slm.running.tracking import settle_tracking
from slm.running.work import versions
from slm_pyfunc.engine.cores import available_cores

PEERS = ("llama_cpp", "openvino_genai")
Rounds = dict[str, list[dict[str, Any]]]


class Worker:
    """A process of bench/workers.py that measures a round whenever it is asked."""

    def __init__(self, *arguments: object, python: str = sys.executable) -> None:
        command = [python, "-m", "bench.workers", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self.read()

    def measure(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args!r} ended, exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


def bench(
    arguments: argparse.Namespace, chat: str, prompt: str, transformers: str
) -> dict[str, Rounds]:
    """Every round of every worker, by group."""
    rounds, threads = arguments.rounds, available_cores()
    onnx = str(next(Path(chat).glob("artifacts/*")))
    peers: dict[str, Any] = {
        name: (name, arguments.gguf, threads)
        for name in PEERS
        if arguments.gguf and is_installed(name, arguments.peers_python)
    }
    results: dict[str, Rounds] = {}
    report("load to first token, and resident memory")
    loads = {
        "bare": ("bare", onnx, threads),
        "chat": ("chat", chat),
        "chat, suppress_warnings": ("chat", chat, "quiet"),
        "import mlflow.pyfunc": ("imports",),
    }
    results["load"] = {name: [] for name in loads}
    for _ in range(rounds):
        for name, worker in loads.items():
            with closing(Worker(*worker)) as started:
                results["load"][name].append(started.ready)
    report("decode, and time to first token")
    workers = {
        "bare": Worker("bare", onnx, threads),
        "chat": Worker("chat", chat),
        "transformers": Worker("transformers", transformers),
    }
    workers |= {name: Worker(*peer, python=arguments.peers_python) for name, peer in peers.items()}
    results["decode"] = take_turns(workers, rounds)
    report("drafts of what an answer repeats")
    results["drafts"] = take_turns({"chat": Worker("drafts", chat)}, rounds)
    report("16 rows in one predict")
    results["rows"] = take_turns({"prompt": Worker("rows", prompt)}, rounds)
    report("the second turn of a conversation")
    results["turns"] = take_turns({"chat": Worker("turns", chat)}, rounds)
    report("16 clients of a scoring server")
    with serving(chat, dict(os.environ)) as server:
        results["clients"] = take_turns({"chat": Worker("clients", server.url)}, rounds)
    return results


def take_turns(workers: dict[str, Worker], rounds: int) -> Rounds:
    """Let each worker measure once a round."""
    with ExitStack() as stack:
        for worker in workers.values():
            stack.enter_context(closing(worker))
        measured: Rounds = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                measured[name].append(worker.measure())
    return measured


def summary(results: dict[str, Rounds]) -> list[tuple[str, float, str]]:
    """The figures of the table: what, value, and the bound that it should keep."""
    load, decode = results["load"], results["decode"]
    together = median(load["bare"], "rss_mb") + median(load["import mlflow.pyfunc"], "rss_mb")
    ttft_ms = [
        1000 * (ours["ttft_s"] - bare["ttft_s"])
        for ours, bare in zip(decode["chat"], decode["bare"], strict=True)
    ]
    rows, clients, turns = results["rows"]["prompt"], results["clients"]["chat"], results["turns"]
    speed = "decode_tokens_per_s"
    start = "load_to_first_token_s"
    figures = [
        ("decode, of the bare loop's", ratio(decode["chat"], decode["bare"], speed), "≥ 0.97"),
        ("time to first token, above the bare loop's (ms)", statistics.median(ttft_ms), "≤ 10"),
        (
            "decode, of the transformers flavor's",
            ratio(decode["chat"], decode["transformers"], speed),
            "≥ 5",
        ),
        ("16 rows in one predict, of one row's tokens/s", sixteen(rows), "≥ 2.3"),
        ("16 clients of a server, of one client's tokens/s", sixteen(clients), "≥ 2.2"),
        (
            "second turn: first token sooner than without reuse",
            statistics.median(r["cold_ttft_s"] / r["reuse_ttft_s"] for r in turns["chat"]),
            "≥ 20",
        ),
        (
            "load to first token, of the bare loop's, suppress_warnings=True",
            ratio(load["chat, suppress_warnings"], load["bare"], start),
            "≤ 1.3",
        ),
        (
            "load to first token, of the bare loop's, MLflow's checks included",
            ratio(load["chat"], load["bare"], start),
            "",
        ),
        (
            "resident memory, of the bare loop's and MLflow's",
            median(load["chat"], "rss_mb") / together,
            "≤ 1.15",
        ),
    ]
    figures += [(f"decode, {n} (tokens/s)", median(r, speed), "") for n, r in decode.items()]
    figures += [
        (f"time to first token, {n} (ms)", 1000 * median(r, "ttft_s"), "")
        for n, r in decode.items()
    ]
    figures += [
        (
            f"prompt of {length} tokens, {n} (tokens/s)",
            median(r, f"prompt_{length}_tokens_per_s"),
            "",
        )
        for length in LONG
        for n, r in decode.items()
    ]
    drafts = results["drafts"]["chat"]
    for kind in ASKING:
        ratios = [r[f"{kind}, {DRAFTED} drafted"] / r[f"{kind}, 0 drafted"] for r in drafts]
        bound = "≥ 0.97" if kind.startswith("story") else "≥ 1.5"
        words = f"{DRAFTED} tokens drafted, {kind}: decode of that without"
        figures.append((words, statistics.median(ratios), bound))
    return figures


def median(rounds: list[dict[str, Any]], figure: str) -> float:
    return statistics.median(measured[figure] for measured in rounds)


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], figure: str) -> float:
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(mine[figure] / other[figure] for mine, other in pairs)


def sixteen(rounds: list[dict[str, Any]]) -> float:
    return statistics.median(r["sixteen_tokens_per_s"] / r["one_tokens_per_s"] for r in rounds)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = versions("mlflow", "onnxruntime-genai", "onnxruntime", "numpy", "torch")
    return {
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cores": available_cores(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": packages,
    }


def is_installed(module: str, python: str) -> bool:
    command = [python, "-m", "bench.workers", "installed", module]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def report(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="registered by main")
    parser.add_argument("--target", default="cpu-int4-rtn-block-32-acc-level-4")
    parser.add_argument("--alias", default="champion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(user_cache()) / "bench.json")
    parser.add_argument("--gguf", help="the checkpoint as GGUF, for the peers")
    parser.add_argument("--peers-python", default=sys.executable, help="where peers are installed")
    arguments = parser.parse_args()
    settle_tracking()
    names = [
        f"{arguments.model}-{arguments.target}-{interface}" for interface in ("chat", "prompt")
    ]
    folders = [
        mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}@{arguments.alias}")
        for name in (*names, f"{arguments.model}-transformers")
    ]
    results = bench(arguments, *folders)
    figures = summary(results)
    record = {"machine": machine(), "figures": figures, "rounds": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    rows = [
        [figure, f"{value:,.3g}" if value < 100 else f"{value:,.0f}", bound]
        for figure, value, bound in figures
    ]
    columns = {"figure": "left", "measured": "right", "bound": "right"}
    Console(width=100, highlight=False).print(table("", columns, rows))
    report(f"every round is in {arguments.out}")


if __name__ == "__main__":
    main()
