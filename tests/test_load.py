"""What the benchmark of the server asks and counts, with answers made up."""

import asyncio
import time
from typing import Any

import pytest

from bench import serve
from bench.load import Seen


def test_no_load_asks_a_prompt_twice_and_one_client_alone_asks_long_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    long_ones: list[tuple[float, float]] = []

    async def ask(url: str, body: dict[str, Any]) -> Seen:
        [message] = body["messages"]
        asked.append(message["content"])
        start = time.monotonic()
        await asyncio.sleep(0.002)
        end = time.monotonic()
        is_long = len(message["content"]) > 1000
        if is_long:
            long_ones.append((start, end))
        ended = not is_long or len(long_ones) % 2 == 0
        return Seen(200, start, [end], end, "text", 8, ended)

    monkeypatch.setattr(serve, "ask", ask)
    monkeypatch.setattr(serve, "CLIENTS", (1, 3))
    monkeypatch.setattr(serve, "report", lambda _: None)
    found = asyncio.run(serve.loads("", "model", 0.1))
    assert len(set(asked)) == len(asked) > 50
    assert all(a[1] <= b[0] for a, b in zip(long_ones, long_ones[1:], strict=False))
    beside, long = list(found.values())[-2:]
    assert beside["failed"] == 0 and long["requests"] == len(long_ones)
    assert long["failed"] == -(-len(long_ones) // 2)
