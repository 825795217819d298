"""HTTP connections, none of which waits for ever for a client that does not read."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

STALLED_S = 30.0  # in which a client has to read something
# Of what waits to be sent, the kernel holds so many bytes at most, so that progress can be seen.
UNSENT = 65536


def connections(limit_s: float) -> type["Connection"]:
    """The protocol for uvicorn: a client may keep an answer waiting for `limit_s` in all."""
    own = {"limit_s": limit_s, "patience_s": min(limit_s, STALLED_S)}
    return type("Connection", (Connection,), own)


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if its client does not read what was sent.

    uvicorn 0.54 waits for room without end: the answer would go on to hold its rows, and the server
    could not stop. A client that reads slowly has `limit_s`.
    """

    limit_s = patience_s = STALLED_S
    alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux and macOS
            own = transport.get_extra_info("socket")
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.look_again(self.loop.time() + self.limit_s)

    def look_again(self, end: float) -> None:
        left = self.transport.get_write_buffer_size()
        self.alarm = self.loop.call_later(self.patience_s, self.look, left, end)

    def look(self, left: int, end: float) -> None:
        """Close the connection unless its client has read some of what was left, and may go on."""
        if self.transport.get_write_buffer_size() < left and self.loop.time() < end:
            self.look_again(end)
        else:
            self.abort_if_stalled()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.quiet()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.quiet()

    def abort_if_stalled(self) -> None:
        """Close the connection if what was sent waits to be read: a disconnect to the request."""
        if self.flow.write_paused:
            self.transport.abort()

    def quiet(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
