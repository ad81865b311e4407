"""One watcher: a snapshot, then changes, at its own pace."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from session_tracker.clock import Clock
from session_tracker.feeds import Feeds, Wish
from session_tracker.metrics import WATCH_LAG, WATCH_MERGED, WATCHERS
from session_tracker.pieces import Span

# A watcher that wants to hear less often than this is no measure of how late the service is.
_MEASURED_INTERVAL_SECONDS = 1.0


class Watching:
    """Leads watchers from what they hold to what stands, again and again.

    Between two answers a watcher costs an offset, however slow it is; while a piece is on its way, that piece.
    """

    def __init__(self, feeds: Feeds, clock: Clock) -> None:
        self._feeds = feeds
        self._clock = clock

    async def answers(self, wish: Wish, epoch: str, offset: int) -> AsyncGenerator[bytes, None]:
        """Yields encoded answers, from `epoch` and `offset` on where that is possible, until the service drains.

        The first comes at once, even with nothing in it, and tells the watcher where it stands.
        """
        measured = wish.interval_seconds <= _MEASURED_INTERVAL_SECONDS
        WATCHERS.inc()
        try:
            with self._feeds.join(wish) as feed:
                span: Span | None = feed.begin(epoch, offset)
                told = feed.told
                opening, rebuilding = True, False
                while span is not None:
                    # Once a part is sent, so are all that follow: only with the last the watcher stands at the end.
                    place, sending = 0, opening
                    while True:
                        part = span.part(place)
                        sending = sending or not part.empty or part.rebuilding != rebuilding
                        if sending:
                            yield part.data
                            if measured and part.reported is not None:
                                WATCH_LAG.observe(self._clock.monotonic() - part.reported)
                            opening, rebuilding = False, part.rebuilding
                        if part.end == span.length:
                            break
                        place = part.end
                    span = await feed.next(span)
                    if span is not None:
                        WATCH_MERGED.inc(max(0, feed.told - told - span.length))
                        told = feed.told
        finally:
            WATCHERS.dec()
