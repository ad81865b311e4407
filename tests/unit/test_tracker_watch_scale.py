"""Lists and watches of 100,000 sessions: what they cost, without a wire."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID

import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from services.call import Call, Principal, Role, begin
from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.feeds import Feeds, Wish
from session_tracker.filters import Filter
from session_tracker.organizations import Organization, Organizations
from session_tracker.packing import PieceMessages
from session_tracker.sessions import Registration
from session_tracker.watch_servicer import WatchServicer
from session_tracker.watching import Watching

SESSIONS = 100_000
ORGANIZATION = UUID(int=1)


@pytest.fixture(scope="module")
def organizations() -> Organizations:
    organizations = Organizations(SessionsConfig(max_per_organization=2 * SESSIONS), Clock())
    organization = organizations.of(ORGANIZATION)
    for number in range(SESSIONS):
        # Ids that do not come in their order, which is the worst case for keeping one.
        name = f"s{number * 61_991 % SESSIONS:06}"
        organization.start(Registration(name, tags=("rare",) if number % 20_000 == 7 else ()))
    return organizations


@pytest.fixture
def organization(organizations: Organizations) -> Organization:
    return organizations.of(ORGANIZATION)


@pytest.fixture
def lists(organizations: Organizations) -> Any:
    begin(Call(Principal("key", ORGANIZATION, Role.WORKER, "UTC"), "request", "ListSessions", None))
    return WatchServicer(organizations, None, Clock(), asyncio.Event())  # type: ignore[arg-type]


async def test_a_page_costs_the_same_however_far_in_and_whatever_begins_and_ends(
    lists: Any, organization: Organization
) -> None:
    first = await lists.ListSessions(pb.ListSessionsRequest(page_size=1), None)
    began = time.perf_counter()
    assert sorted(organization.sessions)[0] == first.sessions[0].session_id
    sorting = time.perf_counter() - began
    request = pb.ListSessionsRequest(page_size=10)
    seconds = []
    for number in range(50):
        organization.start(Registration(f"s{number * 1999:06}-more"))
        organization.drop(f"s{number * 1999 + 1:06}")
        began = time.perf_counter()
        page = await lists.ListSessions(request, None)
        seconds.append(time.perf_counter() - began)
        request.page_token = page.next_page_token
    assert sorted(seconds)[25] < sorting / 2


async def test_a_filter_that_matches_few_looks_at_all_in_slices_between_which_others_are_served(
    lists: Any, organization: Organization
) -> None:
    served = 0

    async def others() -> None:
        nonlocal served
        while True:
            served += 1
            await asyncio.sleep(0)

    serving = asyncio.ensure_future(others())
    page = await lists.ListSessions(pb.ListSessionsRequest(filter=pb.SessionFilter(tag="rare")), None)
    serving.cancel()
    assert len(page.sessions) == SESSIONS // 20_000
    assert not page.next_page_token
    assert served >= SESSIONS // 2000


async def test_a_change_among_many_costs_a_watcher_the_change(organization: Organization) -> None:
    clock, draining = Clock(), asyncio.Event()
    organizations = Organizations(SessionsConfig(), clock)
    organizations._known[ORGANIZATION] = organization
    encoded: list[int] = []
    messages = PieceMessages(clock)

    def encode(epoch: str, piece: Any) -> bytes:
        encoded.append(len(piece.sessions) + len(piece.packed) + len(piece.removed))
        return messages.encoded(epoch, piece)

    watching = Watching(Feeds(organizations, encode, clock, draining), clock)
    streams = [watching.answers(Wish(ORGANIZATION, Filter(), 0.0, True), "", 0) for _ in range(20)]
    names = list(organization.sessions)

    async def open_all(stream: Any) -> None:
        while pb.WatchSessionsResponse.FromString(await anext(stream)).offset == 0:
            # Where the wire would have its turn.
            await asyncio.sleep(0)

    await asyncio.gather(*map(open_all, streams))
    # Twenty snapshots of 100,000 sessions, each session encoded once.
    assert sum(encoded) == len(names)
    encoded.clear()
    for sequence in range(1, 11):
        organization.report([pb.ProgressUpdate(session_id=names[sequence], sequence=1, current_page=1)])
        answers = await asyncio.gather(*[anext(stream) for stream in streams])
        assert len(set(map(id, answers))) == 1
    assert encoded == [1] * 10
    for stream in streams:
        await stream.aclose()
