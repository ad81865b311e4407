"""A session for a crawl that has no event loop: the client runs in a thread beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from muster.client import Client, connect
from muster.following import LiveSession


@contextmanager
def follow(session_id: str, *, client: Client | None = None, **settings: Any) -> Iterator[LiveSession]:
    """Follows a run without `await`.

        with muster.follow("run-7", total_pages=40) as session:
            while session.wait_permit():
                session.page(products=crawl_next_page())

    Leaving the body completes the session as `LiveSession` says, and waits up to 5 s for its result to be committed.

    Args:
        session_id: 1 to 128 characters.
        client: A client that was not used yet, which is closed at the end; None means as the environment says.
        settings: As for `Client.session`.

    Raises:
        NotConfigured: no key is given, or its file cannot be read.
    """
    client = client or connect()
    begun: Future[tuple[LiveSession, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        left = asyncio.Event()
        async with client, client.session(session_id, **settings) as session:
            begun.set_result((session, asyncio.get_running_loop(), left))
            await left.wait()

    def serve() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            if begun.done():
                raise
            begun.set_exception(error)

    thread = threading.Thread(target=serve, name=f"muster {session_id}", daemon=True)
    thread.start()
    session, loop, left = begun.result()
    try:
        yield session
    except BaseException as error:
        session.ends_by(error)
        raise
    finally:
        loop.call_soon_threadsafe(left.set)
        thread.join()
