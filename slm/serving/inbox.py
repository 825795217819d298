"""From the schedulers' threads to the event loop: no thread waits for an answer."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

SILENCE_S = 15.0  # after which a request that waits says that it is alive


class Courier:
    """Carries events into inboxes, with one wake-up of the loop for all that came meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.events: deque[tuple[Inbox, Any]] = deque()
        self.called = False

    def bring(self, inbox: "Inbox", event: Any) -> None:
        """From any thread."""
        self.events.append((inbox, event))
        if not self.called:
            self.called = True
            self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        self.called = False  # before the first is taken: what comes later calls again
        while self.events:
            inbox, event = self.events.popleft()
            inbox.receive(event)


class Inbox:
    """The events of one request, for the one who awaits them; `put` is what a scheduler calls."""

    def __init__(self, courier: Courier) -> None:
        self.courier = courier
        self.events: list[Any] = []
        self.waiter: asyncio.Future[None] | None = None

    def put(self, event: Any) -> None:
        """From any thread."""
        self.courier.bring(self, event)

    def receive(self, event: Any) -> None:
        """From the loop's own thread."""
        self.events.append(event)
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def take(self, patience_s: float = SILENCE_S) -> list[Any]:
        """All events that are there, waiting for the first; none if it does not come in time.

        Each is of a choice, (choice, what). An error among them ends the request: it is raised.
        """
        if not self.events:
            self.waiter = self.courier.loop.create_future()
            alarm = self.courier.loop.call_later(patience_s, self.wake)
            try:
                await self.waiter
            finally:
                alarm.cancel()
                self.waiter = None
        events, self.events = self.events, []
        for event in events:
            what = event if isinstance(event, Exception) else event[1]
            if isinstance(what, Exception):
                raise what
        return events


async def in_daemon(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns or raises, in a thread that keeps no process from ending.

    Those of an executor would: the interpreter waits for them.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def tell(settle: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():  # it may have been cancelled
            settle(outcome)

    def run() -> None:
        try:
            settled = done.set_result, work(*arguments)
        except BaseException as error:
            settled = done.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, *settled)

    threading.Thread(target=run, name="in-daemon", daemon=True).start()
    return await done
