"""Takes up the versions that aliases name next, while the server goes on answering."""

import asyncio
import logging

from slm.config import Config
from slm.errors import StepError, one_line
from slm.running.memory import available_memory_gb
from slm.serving.inbox import in_daemon
from slm.serving.models import Served, alias_of, load, pinned_uri
from slm.serving.service import Service

log = logging.getLogger("slm.serve")

HEADROOM = 1.2  # of the memory that the version before took up
REGISTRY_S = 30.0  # in which the registry has to answer, lest other models wait
TRIES_AGAIN_S = 600.0  # after a version that could not be taken up


class Follower:
    """Asks the registry what the aliases name, and swaps models in the loop's thread.

    The version before answers until the next has loaded and answered, and then ends what it has
    begun.
    """

    def __init__(self, service: Service, config: Config) -> None:
        self.service, self.config = service, config
        # By name and version: when it may be tried again.
        self.failed: dict[tuple[str, str], float] = {}

    async def follow(self, models: list[Served]) -> None:
        """Until it is cancelled."""
        followed = {served.name: alias_of(served.uri) for served in models}
        if not any(followed.values()):
            log.warning("follow: no model_uri names an alias, so there is nothing to follow")
            return
        while True:
            await asyncio.sleep(self.config.serve.follow_every_s)
            for served in list(self.service.models.values()):
                if followed.get(served.name):
                    await self.look(served)

    async def look(self, served: Served) -> None:
        """Take up the version that the alias names now, if it is another one.

        In threads that keep no process from ending: a download may take minutes to be given up.
        """
        now, named = asyncio.get_running_loop().time, ""
        try:
            async with asyncio.timeout(REGISTRY_S):
                _, named = await in_daemon(pinned_uri, served.uri)
            if self.failed.get((served.name, named), 0) > now() or named == served.version:
                return
            self.service.add(await in_daemon(self.next, served))
        except Exception as error:  # the one that serves goes on
            if named:  # otherwise the registry failed: it is asked again with the next look
                self.failed[served.name, named] = now() + TRIES_AGAIN_S
            self.service.metrics.failures.labels(served.name).inc()
            log.error("%s: still %s: %s", served.name, served.model.uri, one_line(error))

    def next(self, served: Served) -> Served:
        """The version that the alias names now, loaded beside the one that serves."""
        needed = HEADROOM * max(served.resident_mb, served.model.size_mb)
        if (free := 1000 * available_memory_gb()) < needed:
            raise StepError(
                f"{served.uri} names another version, and there is no memory for two: "
                f"{needed:.0f} MB are needed, {free:.0f} are free. Start the server again."
            )
        return load(served.uri, self.config.signing, self.config.serve.settings)
