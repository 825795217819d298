"""Clients of an OpenAI server that cost little, and what they see: for the benchmark and the tests.

They speak HTTP by themselves: the openai client takes a core for what two cores generate.
"""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Seen:
    """What a client saw of one request; times are seconds of time.monotonic.

    `ended` says that the answer arrived whole.
    """

    status: int = 0
    start: float = 0.0
    times: list[float] = field(default_factory=list)  # of its pieces
    end: float = 0.0
    text: str = ""
    tokens: int = 0
    ended: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.start

    @property
    def gaps_s(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]


async def post(url: str, path: str, body: bytes, key: str = "") -> AsyncGenerator[bytes, None]:
    """The status of the answer as text, then its body's parts as they come."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=2**22)
    try:
        head = f"POST {place.path}{path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head += f"Authorization: Bearer {key}\r\n\r\n" if key else "\r\n"
        writer.write(head.encode() + body)
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        yield headers.split(b" ", 2)[1]
        if b"transfer-encoding: chunked" in headers:
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
        else:
            while part := await reader.read(2**16):
                yield part
    finally:
        writer.close()


async def ask(
    url: str, body: dict[str, Any], *, leave_after: int | None = None, key: str = ""
) -> Seen:
    """Ask for a streamed chat completion; leave after so many pieces of it, if given."""
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    seen, rest = Seen(start=time.monotonic()), b""
    try:
        answer = post(url, "/chat/completions", json.dumps(streamed).encode(), key)
        seen.status = int(await anext(answer))
        async for part in answer:
            now = time.monotonic()
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                take(seen, event.removeprefix(b"data: "), now)
            if leave_after is not None and len(seen.times) >= leave_after:
                await answer.aclose()
                break
        if seen.status != 200:
            seen.error = rest.decode(errors="replace")
    except (OSError, ValueError, EOFError, asyncio.IncompleteReadError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.end = time.monotonic()
    return seen


def take(seen: Seen, event: bytes, now: float) -> None:
    if event == b"[DONE]":
        seen.ended = True
    elif not event.startswith(b":"):
        chunk = json.loads(event)
        seen.error = str(chunk.get("error", ""))
        if chunk.get("usage"):
            seen.tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk.get("choices", []):
            if piece := choice["delta"].get("content"):
                seen.text += piece
                seen.times.append(now)


async def closed_loop(
    clients: int, seconds: float, request: Callable[[int], Awaitable[Seen]]
) -> list[Seen]:
    """So many clients that ask again as soon as they are answered; `request` gets a number."""
    until, seen, number = time.monotonic() + seconds, [], iter(range(10**9))

    async def client() -> None:
        while time.monotonic() < until:
            seen.append(await request(next(number)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


async def open_loop(
    waits_s: Iterable[float], seconds: float, request: Callable[[int], Awaitable[Seen]]
) -> list[Seen]:
    """Requests that come one after the other, whatever became of those before."""
    until, tasks = time.monotonic() + seconds, []
    for number, wait_s in enumerate(waits_s):
        if time.monotonic() + wait_s > until:
            break
        await asyncio.sleep(wait_s)
        tasks.append(asyncio.ensure_future(request(number)))
    return list(await asyncio.gather(*tasks))


def figures(seen: list[Seen]) -> dict[str, float]:
    """Tokens/s, and times in ms, of the answers that arrived whole."""
    whole = [one for one in seen if one.ended and one.times]
    if not whole:
        return {"requests": len(seen), "failed": len(seen)}
    took = max(one.end for one in whole) - min(one.start for one in whole)
    ttft, gaps = [one.ttft_s for one in whole], [gap for one in whole for gap in one.gaps_s]
    return {
        "requests": len(seen),
        "failed": len(seen) - len(whole),
        "tokens_per_s": sum(one.tokens for one in whole) / took,
        **{f"ttft_ms_p{p}": 1000 * percentile(ttft, p) for p in (50, 95, 99)},
        "inter_token_ms_p95": 1000 * percentile(gaps, 95),
    }


def percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
