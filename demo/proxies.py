"""The exits of the demo: real forward proxies on loopback, one process of the package proxy.py each.

What a proxy relayed is read from its own access log, so the summary can compare it with what the workers say they
fetched.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from demo.children import ChildFailed, fresh_folder, start_child, stop_child

# proxy.py starts its acceptor with multiprocessing. Python 3.14 would do that through a fork server, a third process
# that outlives a killed proxy; at this point the process has one thread, so a plain fork is safe. The tie to the parent
# is not inherited, and the acceptor gets its own.
_RUN_PROXY = """\
import multiprocessing
multiprocessing.set_start_method("fork")
if sys.platform == "linux":
    os.register_at_fork(after_in_child=lambda: ctypes.CDLL(None).prctl(1, 9))
import proxy
proxy.main()
"""

# The function that writes the access log names its lines; everything else proxy.py logs comes from other functions.
_LOG_FORMAT = "%(asctime)s %(funcName)s %(message)s"
_ACCESS_MARK = " access_log "

_START_SECONDS = 20.0
# proxy.py joins its acceptor within about a second of SIGTERM.
_STOP_SECONDS = 5.0
# The site may need seconds for a cold search while the machine is busy; proxy.py would drop the idle client after ten.
_IDLE_SECONDS = 60
_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A forward proxy that answers.

    Attributes:
        name: Its name, `proxy-1` and so on.
        endpoint: Its URL, as an HTTP client takes it: `http://127.0.0.1:PORT`.
        pid: The id of its main process.
        log_path: Its log, which holds one line for each connection it relayed.
    """

    name: str
    endpoint: str
    pid: int
    log_path: Path
    _process: asyncio.subprocess.Process = field(repr=False, compare=False)

    def requests(self) -> int:
        """Count the connections it has relayed since its start, from its access log.

        proxy.py logs a *connection* when it ends, so the number is that of the requests only for clients that use a
        connection once, as `demo.crawl` does. A request just answered may be missing for some milliseconds.

        Returns:
            The number, refused upstream connections included.

        Raises:
            OSError: The log cannot be read.
        """
        with self.log_path.open(encoding="utf-8", errors="replace") as log:
            return sum(_ACCESS_MARK in line for line in log)

    async def stop(self) -> None:
        """Stop it, and wait until it is gone. Its log stays. Stopping twice does nothing."""
        await stop_child(self._process, _STOP_SECONDS)


async def start_proxies(count: int, folder: Path) -> list[RunningProxy]:
    """Start forward proxies on free ports of 127.0.0.1 and wait until each answers.

    Args:
        count: How many, from 1.
        folder: Where each keeps its log and its data, in a folder of its own name; made if absent.

    Returns:
        The proxies, by number. The caller stops them.

    Raises:
        ChildFailed: One did not come up; those that did are stopped again.
        OSError: The folder cannot be written, or a process cannot be started.
    """
    async with AsyncExitStack() as started:
        starts = [asyncio.create_task(_start(f"proxy-{n}", folder / f"proxy-{n}")) for n in range(1, count + 1)]
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        proxies: list[RunningProxy] = []
        failures: list[BaseException] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                failures.append(outcome)
            else:
                started.push_async_callback(outcome.stop)
                proxies.append(outcome)
        if failures:
            raise failures[0]
        started.pop_all()
        return proxies


async def stop_proxies(proxies: Sequence[RunningProxy]) -> None:
    """Stop them all at the same time, and wait until they are gone.

    Args:
        proxies: What `start_proxies` returned; those already stopped are passed over.
    """
    await asyncio.gather(*(proxy.stop() for proxy in proxies))


@asynccontextmanager
async def running_proxies(count: int, folder: Path) -> AsyncIterator[list[RunningProxy]]:
    """Run forward proxies for the length of a block.

    Args:
        count: How many, from 1.
        folder: As for `start_proxies`.

    Yields:
        The proxies, each of which answers.

    Raises:
        ChildFailed: One did not come up.
        OSError: The folder cannot be written, or a process cannot be started.
    """
    proxies = await start_proxies(count, folder)
    try:
        yield proxies
    finally:
        await stop_proxies(proxies)


async def _start(name: str, folder: Path) -> RunningProxy:
    folder = fresh_folder(folder, "proxy.log", "port")
    log_path, port_path, error_path = folder / "proxy.log", folder / "port", folder / "stderr.log"
    process = await start_child(
        _RUN_PROXY,
        *("--hostname", "127.0.0.1", "--port", "0", "--port-file", str(port_path)),
        *("--num-acceptors", "1", "--num-workers", "1"),
        # The threadless executor looks for new connections every 25 ms: 27 ms a request and 1 % of a core when idle,
        # against 1 ms and nothing with a thread per connection.
        "--threaded",
        *("--timeout", str(_IDLE_SECONDS)),
        *("--log-file", str(log_path), "--log-level", "INFO", "--log-format", _LOG_FORMAT),
        # By default all of these are in the home folder.
        *("--data-dir", str(folder / "data"), "--ca-cert-dir", str(folder / "certificates")),
        *("--cache-dir", str(folder / "cache")),
        error_path=error_path,
    )
    try:
        async with asyncio.timeout(_START_SECONDS):
            port = await _answering_port(process, port_path)
    except TimeoutError as late:
        await stop_child(process, _STOP_SECONDS)
        raise ChildFailed(f"{name} did not answer within {_START_SECONDS:.0f} s; see {folder}") from late
    except ChildFailed as failed:
        raise ChildFailed(f"{name} {failed}; see {error_path}") from failed
    except BaseException:
        await stop_child(process, _STOP_SECONDS)
        raise
    return RunningProxy(name, f"http://127.0.0.1:{port}", process.pid, log_path, process)


async def _answering_port(process: asyncio.subprocess.Process, port_path: Path) -> int:
    while True:
        if process.returncode is not None:
            raise ChildFailed(f"ended with code {process.returncode} before it answered")
        port = _port(port_path)
        if port is not None and await _answers(port):
            return port
        await asyncio.sleep(_POLL_SECONDS)


def _port(path: Path) -> int | None:
    # proxy.py gives no other sign than this file, which it writes in place: it may be there and still be empty.
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


async def _answers(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        # Not a proxy request: it is answered with an error by the proxy itself, and its access log does not count it.
        writer.write(b"GET / HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n")
        await writer.drain()
        return (await reader.readline()).startswith(b"HTTP/")
    except OSError:
        return False
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
