"""Files of a folder on a web server, which lists it, or whose index of weights names them."""

import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from slm.errors import InputError, UnreachableError
from slm.sources.artifacts import Listed, explained
from slm.sources.verify import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WANTED,
    WHOLE,
    parse_json,
    require_inside,
    shards_in,
)

log = logging.getLogger("slm.sources")

TRIES = 5  # of a download that breaks off; each goes on where the last one was
TIMEOUT_S = 60
PIECE = 1 << 16  # bytes; of a piece that breaks off, nothing is kept


class Web:
    """A folder of a web server; user and password come from the URL or from ~/.netrc.

    `query` goes with every request: it may sign them.
    """

    def __init__(self, folder: str, query: str, shown: str) -> None:
        import requests

        self.folder, self.query, self.shown = folder, query, shown
        self.session = requests.Session()

    def files_in(self, folder: str = "") -> dict[str, Listed]:
        """The files that the server lists, else those that a checkpoint may have.

        Without a listing, the shards are those that model.safetensors.index.json names.
        """
        with explained(self.shown):
            names = self.listing()
            if names:
                return {name: found for name in names if (found := self.look(name))}
            plain = [name for name in WANTED if "*" not in name]
            plain += [WHOLE, INDEX, ADAPTER_CONFIG, ADAPTER_WEIGHTS]
            known = {name: found for name in plain if (found := self.look(name))}
            if INDEX in known and WHOLE not in known:
                index = parse_json(self.read(known[INDEX]), INDEX)
                for shard in shards_in(index, self.shown):
                    if found := self.look(shard):
                        known[shard] = found
            return known

    def listing(self) -> list[str]:
        """The names in the server's own page or JSON of the folder; none if it has no such page."""
        answer = self.ask("GET", "")
        if not answer.ok:
            if answer.status_code in (401, 403) and not self.look("config.json"):
                answer.raise_for_status()
            return []
        if "json" in answer.headers.get("Content-Type", ""):  # of nginx, say
            return listed_in(answer.content, self.shown)
        links = Links()
        links.feed(answer.text)
        here = urlsplit(answer.url).path.rstrip("/") + "/"
        paths = [urlsplit(urljoin(answer.url, link)).path for link in links.found]
        below = [unquote(path.removeprefix(here)) for path in paths if path.startswith(here)]
        return list(dict.fromkeys(name for name in below if name and "/" not in name))

    def look(self, name: str) -> Listed | None:
        """A file's size and mark; None if the server has no such file."""
        answer = self.ask("HEAD", name)
        if answer.status_code in (403, 404):
            return None
        answer.raise_for_status()
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        size = answer.headers.get("Content-Length")
        if not mark or size is None:
            raise InputError(
                f"{self.shown}: the server says neither ETag nor Last-Modified of {name}, so that "
                "nothing tells whether it changed. Download the folder, and give its path."
            )
        return Listed(name, int(size), mark)

    def read(self, listed: Listed) -> str:
        answer = self.ask("GET", listed.path)
        answer.raise_for_status()
        return answer.text

    def take(self, listed: Listed, destination: Path) -> None:
        """Bring a file, on from where a download broke off; UnreachableError if it fails."""
        destination.unlink(missing_ok=True)
        destination.touch()
        for _ in range(TRIES):
            with explained(self.shown):
                self.go_on(listed, destination)
            if (size := destination.stat().st_size) == listed.size:
                return
            log.info("fetch: %s broke off at %d of %d bytes", listed.path, size, listed.size)
        raise UnreachableError(
            f"{self.shown}: {listed.path} came with {size} of {listed.size} bytes. Run it again."
        )

    def go_on(self, listed: Listed, destination: Path) -> None:
        """Ask for what is missing of a file, if it is still the same, and write what comes."""
        import requests

        there = destination.stat().st_size
        headers = {"Accept-Encoding": "identity"}
        if there:
            headers |= {"Range": f"bytes={there}-", "If-Range": listed.mark}
        with self.ask("GET", listed.path, headers=headers, stream=True) as answer:
            answer.raise_for_status()
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if mark not in (None, listed.mark):
                raise InputError(f"{self.shown}: {listed.path} changed meanwhile. Run it again.")
            with destination.open("ab" if answer.status_code == 206 else "wb") as file:
                try:
                    for piece in answer.iter_content(PIECE):
                        file.write(piece)
                except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                    pass  # the caller looks at what came

    def ask(self, verb: str, name: str, **how: Any) -> Any:
        query = f"?{self.query}" if self.query else ""
        url = f"{self.folder}/{name}{query}"
        return self.session.request(verb, url, timeout=TIMEOUT_S, allow_redirects=True, **how)


def listed_in(text: str | bytes, shown: str) -> list[str]:
    """The files in a JSON listing of a folder; none if it is no such listing."""
    try:
        entries = json.loads(text)
        names = [entry["name"] for entry in entries if entry.get("type") != "directory"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    if not all(isinstance(name, str) for name in names):
        return []
    for name in names:
        require_inside(name, shown)
    return names


class Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]
