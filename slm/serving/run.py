"""A server from its start to its end: loading, listening, following an alias, stopping."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from slm.config import Config
from slm.errors import InputError
from slm.running.summary import INTERRUPTED
from slm.running.tracking import downloads
from slm.serving.connection import Connection, connections
from slm.serving.follow import Follower
from slm.serving.guard import API_KEY, api_key, is_loopback
from slm.serving.inbox import in_daemon
from slm.serving.models import load, require_distinct
from slm.serving.service import Service, application

log = logging.getLogger("slm.serve")

LAST_S = 5  # after serve.shutdown_s, in which the process ends by itself


def serve(config: Config) -> None:
    """Serve the models at `model_uri` until a signal comes; KeyboardInterrupt after Ctrl-C.

    It listens at once, and answers when all models have. Raises what kept one from loading.
    """
    uris, service = uris_of(config.model_uri), Service(config.serve)
    options = options_of(service)
    listener = listening(config.serve.host, config.port)
    host, port = listener.getsockname()[:2]
    if not is_loopback(config.serve.host) and not api_key():
        log.warning("anybody who reaches %s may ask: set %s to a key of your choice", host, API_KEY)
    log.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server = Server(options, service)
    with asyncio.Runner(loop_factory=options.get_loop_factory()) as runner:
        runner.run(server.run_with(listener, uris, config))
    if server.error is not None:
        raise server.error
    if server.interrupted:
        raise KeyboardInterrupt


def options_of(service: Service) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        application(service),  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        http=connections(service.settings.timeout_s),  # h11's: httptools bounds no request's head
        timeout_keep_alive=75,  # longer than proxies', which would meet a closed connection
        # If `stop` did not do.
        timeout_graceful_shutdown=round(service.settings.shutdown_s) + 2,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which is told what a signal means, and loads the models beside it."""

    def __init__(self, options: uvicorn.Config, service: Service) -> None:
        super().__init__(options)
        self.service = service
        self.error: BaseException | None = None
        self.interrupted = False

    async def run_with(self, listener: socket.socket, uris: list[str], config: Config) -> None:
        loading = asyncio.create_task(self.load(uris, config))
        await self.serve([listener])
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading

    async def load(self, uris: list[str], config: Config) -> None:
        """Load the models one after the other, and follow their aliases if asked to."""
        service, models = self.service, []
        try:
            for uri in uris:
                one = uri, config.signing, config.serve.settings
                models.append(await in_daemon(load, *one))
            require_distinct(models)
            for served in models:
                service.add(served)
            log.info("ready: %s", ", ".join(service.models))
            if config.follow:
                await Follower(service, config).follow(models)
        except Exception as error:
            self.error, self.should_exit = error, True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which would end the process by the signal."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.heed) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def heed(self, number: int, frame: FrameType | None) -> None:
        """Stop, when what is under way has ended or its time is over; at once the second time."""
        self.interrupted |= number == signal.SIGINT
        if self.should_exit:
            self.force_exit = True
            self.end_in(1)
            return
        self.should_exit = True
        under_way, limit_s = len(self.service.inboxes), self.service.settings.shutdown_s
        self.end_in(limit_s + LAST_S)
        log.info("stopping: %d requests are under way, for at most %g s", under_way, limit_s)
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(self.stop, limit_s)

    def stop(self, limit_s: float) -> None:
        self.service.stopping = True
        asyncio.get_running_loop().call_later(limit_s, self.end_requests)

    def end_requests(self) -> None:
        self.service.stop()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):  # of a client that does not read the error
                connection.abort_if_stalled()

    def end_in(self, seconds: float) -> None:
        """End the process, if it has not ended by then.

        The interpreter waits for threads of libraries, as those in which MLflow 3.17 downloads.
        """
        last = threading.Timer(seconds, end_now, [INTERRUPTED if self.interrupted else 0])
        last.daemon = True
        last.start()


def end_now(exit_code: int) -> None:
    log.warning("stopped, though a thread goes on")
    downloads().cleanup()
    os._exit(exit_code)


def listening(host: str, port: int) -> socket.socket:
    """A listening socket; InputError if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"serve.host={host} port={port} cannot be listened at: {error.strerror or error}"
        ) from error


def uris_of(given: Any) -> list[str]:
    """The URIs in `model_uri`: one, or a list."""
    uris = [given] if isinstance(given, str) else list(given or [])
    if not uris:
        raise InputError(
            "model_uri is missing: pass models:/<name>@champion, or a list of such URIs."
        )
    return [str(uri) for uri in uris]
