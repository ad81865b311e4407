"""The site of the demo: Python's own documentation as `pydoc` serves it, behind a small front.

`pydoc` renders its pages by importing the module, and its keyword search reads the first line of every module; both are
real and unchanged. The child sees the standard library alone, so that the pages are the same whatever else is installed.

The front gives what a crawler meets on a site and pydoc lacks: a session cookie, robots.txt, status codes, and now and then
a 429 with Retry-After. pydoc answers one request at a time and needs 5 to 350 ms for a page, so the front keeps what it
rendered in a bounded cache; each page and each keyword goes through pydoc at least once.

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
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

from demo.proxies import ChildFailed, child_command, stop_child

SESSION_COOKIE = "sid"
VISITS_COOKIE = "visits"

# Reading standard input is how pydoc's server waits to be told to quit: it also ends when the front's end of the pipe does.
_RUN_PYDOC = """\
import pydoc
pydoc.browse(0, hostname="127.0.0.1", open_browser=False)
"""
_RUN_SITE = """\
import runpy
runpy.run_module("demo.site", run_name="__main__", alter_sys=True)
"""

# To show a module is to import it, and importing these opens a window or a browser, or prints to the terminal.
_CLOSED_PREFIXES = ("/antigravity.", "/idlelib", "/this.", "/tkinter", "/turtle", "/__main__", "/test.", "/_test")
# Suites and programs: importing them runs something. Two levels reach all of the standard library's.
_CLOSED_PATTERNS = ("*/test", "*/tests", "*/__main__.py", "*/*/__main__.py")

_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_SESSION = re.compile(r"[0-9a-f]{32}")
_STYLE_SHEET = "/pydoc_data/_pydoc.css"
_ERROR_TITLE = b"<title>Pydoc: Error - "

# A run of the whole demo fills about 20 MB.
_CACHE_BYTES = 64 * 1024 * 1024
_MAX_VISITORS = 10_000
_RENDER_SECONDS = 30.0
_START_SECONDS = 20.0
_STOP_SECONDS = 3.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Page:
    """A page as pydoc rendered it.

    Attributes:
        status: 200, or 404 for what pydoc shows as an error page under status 200.
        content_type: Its media type.
        body: Its bytes, in UTF-8.
    """

    status: int
    content_type: str
    body: bytes


class PageCache:
    """The pages used last, up to a size in bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache.

        Args:
            max_bytes: The most all bodies may take together; a page larger than this is not kept.
        """
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pages: OrderedDict[str, Page] = OrderedDict()

    def get(self, path: str) -> Page | None:
        """Return the page, which becomes the one used last, or None."""
        page = self._pages.get(path)
        if page is not None:
            self._pages.move_to_end(path)
        return page

    def put(self, path: str, page: Page) -> None:
        """Keep a page in place of those unused the longest."""
        replaced = self._pages.pop(path, None)
        self._bytes += len(page.body) - (len(replaced.body) if replaced else 0)
        self._pages[path] = page
        while self._bytes > self._max_bytes:
            _, dropped = self._pages.popitem(last=False)
            self._bytes -= len(dropped.body)


class Pydoc:
    """pydoc's own HTTP server in a child process, and the pages it has rendered."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, cache: PageCache) -> None:
        """Take over a running server; `run_pydoc` makes one.

        Args:
            process: The server's process, which the caller stops.
            url: Its base URL, without a slash at the end.
            cache: Where rendered pages are kept.
        """
        self.process = process
        self._url = url
        self._cache = cache
        self._turn = asyncio.Lock()
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_RENDER_SECONDS))

    async def page(self, path: str) -> Page:
        """Return a page, rendered now or before.

        Args:
            path: The path and query as pydoc knows them, such as `/json.html` or `/search?key=json`.

        Raises:
            aiohttp.ClientError: pydoc does not answer properly.
            TimeoutError: pydoc took more than 30 s.
        """
        if (page := self._cache.get(path)) is not None:
            return page
        # pydoc takes one request at a time anyway; waiting here also lets those who want the same page render it once.
        async with self._turn:
            if (page := self._cache.get(path)) is not None:
                return page
            async with self._client.get(self._url + path) as answer:
                body = await answer.read()
                status = 404 if _ERROR_TITLE in body[:1024] else answer.status
                page = Page(status, answer.content_type, body)
            self._cache.put(path, page)
            return page

    async def close(self) -> None:
        """Close the connections to the server. The process goes on."""
        await self._client.close()


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
    drain: asyncio.Task[None] | None = None
    try:
        assert process.stdout is not None, "asked for above"
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)
        except TimeoutError as late:
            raise ChildFailed(f"pydoc gave no address within {_START_SECONDS:.0f} s") from late
        match = re.search(rb"http://\S+", line)
        if match is None:
            raise ChildFailed(f"pydoc said {line.decode(errors='replace').strip()!r} instead of its address")
        # A module may print while it is imported; a full pipe would stop the server.
        drain = asyncio.create_task(_drain(process.stdout))
        pydoc = Pydoc(process, match[0].decode().rstrip("/"), PageCache(_CACHE_BYTES))
        try:
            yield pydoc
        finally:
            await pydoc.close()
    finally:
        await stop_child(process, _STOP_SECONDS)
        if drain is not None:
            await drain


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass


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
                return web.Response(status=429, text="Too many requests; please come back later.\n", headers=wait)
            sent = request.cookies.get(SESSION_COOKIE, "")
            # A well-formed session of an earlier run of the site is taken up: the workers' profiles outlive it.
            session = sent if _SESSION.fullmatch(sent) else secrets.token_hex(16)
            request["session"] = session
            response = await handler(request)
            response.set_cookie(SESSION_COOKIE, session, max_age=86400 * 365, httponly=True, samesite="Lax")
            return response

        return handle

    async def _search(self, request: web.Request) -> web.StreamResponse:
        key = request.query.get("key", "")
        # pydoc takes the key as it stands in the URL, without decoding it.
        if not re.fullmatch(r"[\w.]{1,64}", key, re.ASCII):
            return web.Response(status=400, text="The key is one word of ASCII letters, digits, dots and underscores.\n")
        response = await self._page(f"/search?key={key}")
        if response.status == 200:
            session = str(request["session"])
            count = self.visits.pop(session, 0) + 1
            self.visits[session] = count
            if len(self.visits) > _MAX_VISITORS:
                self.visits.popitem(last=False)
            response.set_cookie(VISITS_COOKIE, str(count), max_age=86400 * 365, samesite="Lax")
        return response

    async def _topic(self, request: web.Request) -> web.StreamResponse:
        key = request.query.get("key", "")
        # pydoc shows the module of that name when there is no such topic.
        if self._is_closed(f"/{key}.html"):
            return _closed()
        # Topics such as `+=` stand in the links of the site undecoded as well.
        return await self._page("/topic?" + request.rel_url.raw_query_string)

    async def _document(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "index")
        path = f"/{name}.html"
        if not _NAME.fullmatch(name):
            return web.Response(status=404, text="There is no such page.\n")
        if self._is_closed(path):
            return _closed()
        return await self._page(path)

    async def _style(self, request: web.Request) -> web.StreamResponse:
        return await self._page(_STYLE_SHEET)

    async def _robots(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="User-agent: *\n" + "".join(f"Disallow: {prefix}\n" for prefix in self.closed))

    async def _visits(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(dict(self.visits))

    def _is_closed(self, path: str) -> bool:
        return path.startswith(self.closed)

    async def _page(self, path: str) -> web.Response:
        try:
            page = await self.pydoc.page(path)
        except TimeoutError:
            return web.Response(status=504, text="The page took too long.\n")
        except aiohttp.ClientError:
            return web.Response(status=502, text="The page could not be rendered.\n")
        return web.Response(status=page.status, body=page.body, content_type=page.content_type, charset="utf-8")


def _closed() -> web.Response:
    return web.Response(status=403, text="This page is not shown; see /robots.txt.\n")


async def serve(
    port: int, ready_file: Path | None, *, busy_rate: float, retry_after_seconds: int, seed: int
) -> int:
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
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, told.set)
    async with run_pydoc() as pydoc:
        closed = closed_prefixes(Path(sysconfig.get_path("stdlib")))
        # Not for secrets: the same seed is to shed the same requests.
        front = Front(pydoc, closed, busy_rate, retry_after_seconds, random.Random(seed))  # noqa: S311
        runner = web.AppRunner(front.application(), access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=1.0)
            await site.start()
            _announce(f"http://127.0.0.1:{runner.addresses[0][1]}", ready_file)
            waits = [asyncio.create_task(told.wait()), asyncio.create_task(pydoc.process.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
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
        return
    draft = ready_file.with_name(ready_file.name + ".draft")
    draft.write_text(text)
    draft.replace(ready_file)
