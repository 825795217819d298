"""HTTP connections, none of which waits for ever for a client that does not read."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

STALLED_S = 30.0  # in which a client has to make room for more


def connections(patience_s: float) -> type["Connection"]:
    """The protocol for uvicorn: connections that give up after `patience_s`."""
    return type("Connection", (Connection,), {"patience_s": min(patience_s, STALLED_S)})


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if its client does not read what was sent.

    uvicorn 0.54 waits for room without end: the answer would go on to hold its rows, and the server
    could not stop.
    """

    patience_s = STALLED_S
    alarm: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.alarm = self.loop.call_later(self.patience_s, self.abort_if_stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.quiet()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.quiet()

    def abort_if_stalled(self) -> None:
        """Close the connection at once, unless its client reads: a disconnect to the request."""
        if self.flow.write_paused:
            self.transport.abort()

    def quiet(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
