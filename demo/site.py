"""The site of the demo: Python's own documentation as `pydoc` serves it, behind a small front.

`pydoc` renders a page by importing the module, and its keyword search reads the first line of every module; both are
real and unchanged. The child sees the standard library alone, so the pages do not depend on what else is installed.

The front gives what a crawler meets on a site and pydoc lacks: a session cookie, robots.txt, status codes, and now and
then a 429 with Retry-After. pydoc answers one request at a time and needs 5 to 350 ms for a page, so the front keeps
what it rendered in a bounded cache; each page and each keyword goes through pydoc at least once.

    python -m demo.site --port 0 --ready-file FILE
"""

import argparse
import asyncio
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import aiohttp
from aiohttp import web

from demo.children import ChildFailed, child_command, fresh_folder, start_child, stop_child

SESSION_COOKIE = "sid"
VISITS_COOKIE = "visits"

# pydoc's server waits for its user on standard input: it also ends when the front's end of that pipe is gone.
_RUN_PYDOC = """\
import pydoc
pydoc.browse(0, hostname="127.0.0.1", open_browser=False)
"""
_RUN_SITE = """\
from demo.site import main
sys.exit(main())
"""

# To show a module is to import it, and importing these opens a window or a browser, or prints to the terminal.
_CLOSED_PREFIXES = ("/antigravity.", "/idlelib", "/this.", "/tkinter", "/turtle", "/__main__", "/test.", "/_test")
# Suites and programs: importing them runs something. Two levels reach all of the standard library's.
_CLOSED_PATTERNS = ("*/test", "*/tests", "*/__main__.py", "*/*/__main__.py")

# pydoc reads any style sheet which a path or a query ending in .css leads to: a key has no dots.
_KEY = re.compile(r"\w{1,64}", re.ASCII)
_NAME = re.compile(r"\w[\w-]*(\.\w[\w-]*)*", re.ASCII)
_SESSION = re.compile(r"[0-9a-f]{32}")
_STYLE_SHEET = "/pydoc_data/_pydoc.css"
_ERROR_TITLE = b"<title>Pydoc: Error - "

# A run of the whole demo fills about 7 MB; this is for those who look around in a browser.
_CACHE_BYTES = 64 * 1024 * 1024
_MAX_VISITORS = 10_000
_YEAR_SECONDS = 365 * 86_400
_CLOSED_TEXT = "This page is not shown; see /robots.txt.\n"
_RENDER_SECONDS = 30.0
_START_SECONDS = 20.0
_STOP_SECONDS = 3.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Page:
    """A page as pydoc rendered it, in UTF-8; its error pages, which come as 200, have the status 404 here."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class RunningSite:
    """The site's base URL, without a slash at the end, and the id of the front's process, whose child is pydoc."""

    url: str
    pid: int


class Pydoc:
    """pydoc's own HTTP server in a child process, and the pages it has rendered last."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        """Take over a server that answers at `url` (no slash at the end); the caller stops its process."""
        self.process, self._url = process, url
        self._turn = asyncio.Lock()
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_RENDER_SECONDS))
        self._cache: OrderedDict[str, Page] = OrderedDict()
        self._cached_bytes = 0

    async def page(self, path: str) -> Page:
        """Return a page, rendered now or before.

        Args:
            path: The path and query as pydoc knows them, such as `/json.html` or `/search?key=json`.

        Raises:
            aiohttp.ClientError: pydoc does not answer properly.
            TimeoutError: pydoc took more than 30 s.
        """
        # pydoc takes one request at a time anyway; waiting here also lets those who want the same page render it once.
        if path not in self._cache:
            async with self._turn:
                if path not in self._cache:
                    self._keep(path, await self._render(path))
        self._cache.move_to_end(path)
        return self._cache[path]

    async def close(self) -> None:
        """Close the connections to the server. The process goes on."""
        await self._client.close()

    async def _render(self, path: str) -> Page:
        async with self._client.get(self._url + path) as answer:
            body = await answer.read()
            return Page(404 if _ERROR_TITLE in body[:1024] else answer.status, answer.content_type, body)

    def _keep(self, path: str, page: Page) -> None:
        self._cache[path] = page
        self._cached_bytes += len(page.body)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped.body)


@asynccontextmanager
async def run_pydoc() -> AsyncIterator[Pydoc]:
    """Run pydoc's server on a free port for the length of a block.

    Yields:
        The server, which answers.

    Raises:
        ChildFailed: It did not come up.
    """
    # -I and -S hide the working directory and site-packages, whose modules pydoc would import to show them.
    command = child_command(_RUN_PYDOC, interpreter_flags=("-I", "-S", "-W", "ignore"))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    drain: asyncio.Task[bytes] | None = None
    try:
        output = cast(asyncio.StreamReader, process.stdout)
        try:
            line = await asyncio.wait_for(output.readline(), _START_SECONDS)
        except TimeoutError as late:
            raise ChildFailed(f"pydoc gave no address within {_START_SECONDS:.0f} s") from late
        match = re.search(rb"http://\S+", line)
        if match is None:
            raise ChildFailed(f"pydoc said {line.decode(errors='replace').strip()!r} instead of its address")
        # A module may print while it is imported; a full pipe would stop the server.
        drain = asyncio.create_task(output.read())
        pydoc = Pydoc(process, match[0].decode().rstrip("/"))
        try:
            yield pydoc
        finally:
            await pydoc.close()
    finally:
        await stop_child(process, _STOP_SECONDS)
        if drain is not None:
            await drain


def closed_prefixes(library: Path) -> tuple[str, ...]:
    """List the paths which the site does not show, since to show a module is to import it.

    Args:
        library: The folder of the standard library.

    Returns:
        Prefixes of paths, as robots.txt takes them.
    """
    found = set(_CLOSED_PREFIXES)
    for pattern in _CLOSED_PATTERNS:
        for path in library.glob(pattern):
            parts = path.relative_to(library).with_suffix("").parts
            if parts[0] != "site-packages":
                found.add("/" + ".".join(parts))
    return tuple(sorted(found))


@dataclass(slots=True)
class Front:
    """What stands before pydoc: cookies, robots.txt, status codes and load shedding.

    Attributes:
        pydoc: The server behind it.
        closed: Prefixes of paths it refuses with 403, which robots.txt names.
        busy_rate: The share of page requests it answers with 429, 0 to 1.
        retry_after_seconds: What such an answer asks the client to wait.
        chance: Decides which requests those are, by their order of arrival.
        visits: Searches answered, by session; the 10,000 sessions seen last.
    """

    pydoc: Pydoc
    closed: tuple[str, ...]
    busy_rate: float
    retry_after_seconds: int
    chance: random.Random
    visits: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def application(self) -> web.Application:
        """Build the web application."""
        application = web.Application()
        application.router.add_get("/robots.txt", self._robots)
        application.router.add_get("/__visits", self._visits)
        application.router.add_get("/search", self._guarded(self._search))
        application.router.add_get("/topic", self._guarded(self._topic))
        application.router.add_get(_STYLE_SHEET, self._style)
        application.router.add_get("/", self._guarded(self._document))
        application.router.add_get("/{name}.html", self._guarded(self._document))
        return application

    def _guarded(self, handler: _Handler) -> _Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if self.chance.random() < self.busy_rate:
                wait = {"Retry-After": str(self.retry_after_seconds)}
                return web.Response(status=429, text="Too many requests.\n", headers=wait)
            sent = request.cookies.get(SESSION_COOKIE, "")
            # A well-formed session of an earlier run of the site is taken up: the workers' profiles outlive it.
            request["session"] = session = sent if _SESSION.fullmatch(sent) else secrets.token_hex(16)
            response = await handler(request)
            response.set_cookie(SESSION_COOKIE, session, max_age=_YEAR_SECONDS, httponly=True, samesite="Lax")
            return response

        return handle

    async def _search(self, request: web.Request) -> web.StreamResponse:
        key = request.query.get("key", "")
        # pydoc takes the key as it stands in the URL, without decoding it.
        if not _KEY.fullmatch(key):
            return web.Response(status=400, text="The key is one word of ASCII letters, digits and underscores.\n")
        response = await self._page(f"/search?key={key}")
        if response.status == 200:
            session = str(request["session"])
            self.visits[session] = count = self.visits.pop(session, 0) + 1
            if len(self.visits) > _MAX_VISITORS:
                self.visits.popitem(last=False)
            response.set_cookie(VISITS_COOKIE, str(count), max_age=_YEAR_SECONDS, samesite="Lax")
        return response

    async def _topic(self, request: web.Request) -> web.StreamResponse:
        key = request.query.get("key", "")
        if not _KEY.fullmatch(key):
            return web.Response(status=404, text="There is no such topic.\n")
        # pydoc shows the module of that name when there is no such topic.
        if f"/{key}.html".startswith(self.closed):
            return web.Response(status=403, text=_CLOSED_TEXT)
        return await self._page(f"/topic?key={key}")

    async def _document(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "index")
        if not _NAME.fullmatch(name):
            return web.Response(status=404, text="There is no such page.\n")
        path = f"/{name}.html"
        if path.startswith(self.closed):
            return web.Response(status=403, text=_CLOSED_TEXT)
        return await self._page(path)

    async def _style(self, request: web.Request) -> web.StreamResponse:
        return await self._page(_STYLE_SHEET)

    async def _robots(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="User-agent: *\n" + "".join(f"Disallow: {prefix}\n" for prefix in self.closed))

    async def _visits(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(dict(self.visits))

    async def _page(self, path: str) -> web.Response:
        try:
            page = await self.pydoc.page(path)
        except TimeoutError:
            return web.Response(status=504, text="The page took too long.\n")
        except aiohttp.ClientError:
            return web.Response(status=502, text="The page could not be rendered.\n")
        return web.Response(status=page.status, body=page.body, content_type=page.content_type, charset="utf-8")


async def serve(port: int, ready_file: Path | None, *, busy_rate: float, retry_after_seconds: int, seed: int) -> int:
    """Run the site until SIGTERM or SIGINT.

    Args:
        port: The port on 127.0.0.1; 0 takes a free one.
        ready_file: Where to write `{"url": ..., "pid": ...}` once the site answers; without it, standard output.
        busy_rate: The share of page requests answered with 429, 0 to 1.
        retry_after_seconds: What such an answer asks the client to wait.
        seed: Of the choice of these requests.

    Returns:
        The exit code: 0 when it was told to stop, 1 when pydoc ended by itself.

    Raises:
        ChildFailed: pydoc did not come up.
        OSError: The port is in use, or the ready file cannot be written.
    """
    told = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, told.set)
    async with run_pydoc() as pydoc:
        closed = closed_prefixes(Path(sysconfig.get_path("stdlib")))
        front = Front(pydoc, closed, busy_rate, retry_after_seconds, random.Random(seed))
        runner = web.AppRunner(front.application(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            _announce(f"http://127.0.0.1:{runner.addresses[0][1]}", ready_file)
            ends = [asyncio.create_task(wait) for wait in (told.wait(), pydoc.process.wait())]
            _, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for wait in waiting:
                wait.cancel()
        finally:
            await runner.cleanup()
        if told.is_set():
            return 0
        print(f"pydoc ended with code {pydoc.process.returncode}", file=sys.stderr)
        return 1


def _announce(url: str, ready_file: Path | None) -> None:
    text = json.dumps({"url": url, "pid": os.getpid()})
    if ready_file is None:
        print(text, flush=True)
    else:
        draft = ready_file.with_name(ready_file.name + ".draft")
        draft.write_text(text)
        draft.replace(ready_file)


@asynccontextmanager
async def running_site(
    folder: Path, *, busy_rate: float = 0.02, retry_after_seconds: int = 1, seed: int = 1
) -> AsyncIterator[RunningSite]:
    """Run the site in a process of its own for the length of a block.

    Args:
        folder: Where it keeps its ready file and its errors; made if absent.
        busy_rate: As for `serve`.
        retry_after_seconds: As for `serve`.
        seed: As for `serve`.

    Yields:
        The site, which answers.

    Raises:
        ChildFailed: It did not come up.
        OSError: The folder cannot be written.
    """
    folder = fresh_folder(folder, "ready.json")
    ready, error_path = folder / "ready.json", folder / "stderr.log"
    process = await start_child(
        _RUN_SITE,
        *("--ready-file", str(ready), "--busy-rate", str(busy_rate)),
        *("--retry-after-seconds", str(retry_after_seconds), "--seed", str(seed)),
        error_path=error_path,
    )
    deadline = time.monotonic() + _START_SECONDS
    try:
        while not ready.exists():
            if process.returncode is not None or time.monotonic() > deadline:
                raise ChildFailed(f"the site did not come up; see {error_path}")
            await asyncio.sleep(0.01)
        yield RunningSite(json.loads(ready.read_text())["url"], process.pid)
    finally:
        await stop_child(process, 2 * _STOP_SECONDS)


def main() -> int:
    """Run the site as a command.

    Returns:
        The exit code: 0 when told to stop, 1 when pydoc failed, 2 when it cannot start.
    """
    parser = argparse.ArgumentParser(prog="python -m demo.site", description="Python's documentation as a site.")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--ready-file", type=Path, help="where to write the URL as JSON; default: standard output")
    parser.add_argument("--busy-rate", type=float, default=0.02, help="share of page requests answered with 429")
    parser.add_argument("--retry-after-seconds", type=int, default=1, help="what a 429 asks the client to wait")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of these requests")
    try:
        return asyncio.run(serve(**vars(parser.parse_args())))
    except (ChildFailed, OSError) as cause:
        print(f"the site cannot start: {cause}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
