"""The HTTP adapter of external exits against a real server that fails in every way we know; no database needed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import uuid_utils.compat as uuids
from pydantic import ValidationError

from allocator.config import AllocatorConfig, ExitProviderConfig
from allocator.exit_provider_http import HttpExitProvider
from allocator.exit_providers import Circuit, ExitUnavailable, GuardedProvider, NoneFree, ProviderFault
from services.errors import StartupError
from tests.support.exit_provider import TOKEN, Fault, ProviderServer

ORGANIZATION = UUID(int=7)
DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-provider.openapi.yaml"
# Those of which the adapter cannot know whether the work was done.
SPOILT = [fault for fault in Fault if fault is not Fault.NONE_FREE]


def _whole(fault: Fault) -> list[Fault]:
    """A fault as one call of the adapter sees it: a dropped connection is tried again below it, once."""
    return [fault] * (2 if fault is Fault.LOST else 1)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def server() -> AsyncIterator[ProviderServer]:
    async with ProviderServer() as server:
        yield server


@pytest.fixture
def config(server: ProviderServer, tmp_path: Path) -> ExitProviderConfig:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    return ExitProviderConfig(url=server.url, token_file=token, holder="muster-test", timeout_seconds=0.3)


@pytest.fixture
async def adapter(config: ExitProviderConfig) -> AsyncIterator[HttpExitProvider]:
    adapter = HttpExitProvider(config)
    yield adapter
    await adapter.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guarded(adapter: HttpExitProvider, clock: Clock) -> GuardedProvider:
    return GuardedProvider("vpn", adapter, Circuit(3.0, clock))


async def test_an_exit_is_taken_listed_and_given_back(adapter: HttpExitProvider, server: ProviderServer) -> None:
    key = uuids.uuid7()
    exit_ = await adapter.take(key, ORGANIZATION, "kr", 21_600.0)
    assert (exit_.exit_ip, exit_.region) == ("203.0.113.1", "kr")
    assert exit_.endpoint.startswith("socks5://")
    assert await adapter.held(None) == [key]
    assert await adapter.held(key) == []
    await adapter.health()
    for _ in range(2):
        await adapter.give_back(key)
    assert server.leases == {}


@pytest.mark.parametrize("fault", SPOILT, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", ["take", "held"])
async def test_whatever_comes_back_is_an_exit_or_a_fault(
    adapter: HttpExitProvider, server: ProviderServer, fault: Fault, name: str
) -> None:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "take": lambda: adapter.take(uuids.uuid7(), ORGANIZATION, "", 60.0),
        "held": lambda: adapter.held(None),
    }
    server.faults.extend(_whole(fault))
    with pytest.raises(ProviderFault) as caught:
        await calls[name]()
    assert 0 < len(str(caught.value)) <= 200
    assert TOKEN not in str(caught.value)
    # The connection is fit for the next call, or another is made.
    await calls[name]()


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.BROKEN, Fault.LOST, Fault.PROTOCOL], ids=lambda fault: fault.name)
async def test_a_release_that_is_not_confirmed_is_a_fault(
    adapter: HttpExitProvider, server: ProviderServer, fault: Fault
) -> None:
    server.faults.extend(_whole(fault))
    with pytest.raises(ProviderFault):
        await adapter.give_back(uuids.uuid7())
    await adapter.give_back(uuids.uuid7())


async def test_a_server_that_is_down_is_a_fault(adapter: HttpExitProvider, server: ProviderServer) -> None:
    await adapter.health()
    await server.stop()
    with pytest.raises(ProviderFault):
        await adapter.health()
    await server.start()
    await adapter.health()


async def test_an_endless_answer_is_read_to_a_bound(adapter: HttpExitProvider, server: ProviderServer) -> None:
    server.faults.append(Fault.LONG)
    with pytest.raises(ProviderFault, match="longer than 262144 bytes"):
        await adapter.held(None)


async def test_a_wrong_token_is_a_fault_and_a_missing_one_stops_the_start(
    config: ExitProviderConfig, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("another")
    stranger = HttpExitProvider(config.model_copy(update={"token_file": tmp_path / "other"}))
    with pytest.raises(ProviderFault, match="status 401") as caught:
        await stranger.held(None)
    assert not caught.value.lost
    await stranger.close()
    with pytest.raises(StartupError, match="cannot read the secret"):
        HttpExitProvider(config.model_copy(update={"token_file": tmp_path / "missing"}))


async def test_an_exit_that_is_not_as_asked_is_a_fault(adapter: HttpExitProvider, server: ProviderServer) -> None:
    asked, now = uuids.uuid7(), datetime.now(UTC)

    async def take(region: str, region_given: str, ends_in: float, key: UUID = asked) -> None:
        ends = (now + timedelta(seconds=ends_in)).isoformat()
        exit_ = {"exit_ip": "203.0.113.1", "endpoint": "http://h:1", "region": region_given, "expires_at": ends}
        server.answers.append(exit_)
        await adapter.take(key, ORGANIZATION, region, 3600.0)

    with pytest.raises(ProviderFault, match="expires before") as caught:
        await take("kr", "kr", 3500)
    assert not caught.value.lost
    with pytest.raises(ProviderFault, match="of region 'us', not 'kr'") as caught:
        await take("kr", "us", 3600)
    assert not caught.value.lost
    # A clock that is a little behind, a region that is not told, and any region where none was asked for will do.
    await take("kr", "kr", 3570)
    await take("kr", "", 3600)
    await take("", "us", 3600)
    # A repeat after half an hour gets what was taken then.
    long_ago = UUID(int=asked.int - (1800 * 1000 << 80))
    await take("kr", "kr", 1800, long_ago)


@pytest.mark.parametrize("address", ["fe80::1%eth0", "fe80::1%\0", "203.0.113.1%1"])
async def test_an_address_has_no_scope(adapter: HttpExitProvider, server: ProviderServer, address: str) -> None:
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    server.answers.append({"exit_ip": address, "endpoint": "http://h:1", "region": "", "expires_at": ends})
    with pytest.raises(ProviderFault, match="exit_ip"):
        await adapter.take(uuids.uuid7(), ORGANIZATION, "", 60.0)


@pytest.mark.parametrize("url", ["exits.example", "ftp://exits.example", "http://user:secret@host/", "http://h/?a=b"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        ExitProviderConfig(url=url, holder="x")


def test_a_provider_has_a_name_that_a_slot_can_ask_for() -> None:
    provider = {"url": "http://h", "holder": "x"}
    AllocatorConfig.model_validate({"exit_providers": {"kr-vpn.1": provider}})
    with pytest.raises(ValidationError):
        AllocatorConfig.model_validate({"exit_providers": {"a b": provider}})


async def test_a_lost_answer_is_asked_for_again_and_takes_one_exit(
    guarded: GuardedProvider, server: ProviderServer
) -> None:
    key = uuids.uuid7()
    server.faults.extend([Fault.LOST, Fault.CUT])
    exit_ = await guarded.take(key, ORGANIZATION, "", 60.0)
    assert (server.counted("PUT"), server.taken, set(server.leases)) == (3, 1, {key})
    assert exit_.exit_ip == server.leases[key]["exit_ip"]
    assert guarded.available
    assert guarded.answered_at is not None


async def test_retries_are_bounded(guarded: GuardedProvider, server: ProviderServer) -> None:
    server.always = Fault.BROKEN
    with pytest.raises(ExitUnavailable, match="status 500"):
        await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert server.counted("PUT") == 3
    assert (guarded.available, guarded.last_error) == (False, "take: status 500")


@pytest.mark.parametrize(
    "fault", [Fault.REFUSED, Fault.GARBAGE, Fault.SCHEMA, Fault.LONG, Fault.EARLY], ids=lambda fault: fault.name
)
async def test_what_will_not_get_better_is_not_repeated(
    guarded: GuardedProvider, server: ProviderServer, fault: Fault
) -> None:
    server.always = fault
    with pytest.raises(ExitUnavailable):
        await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert server.counted("PUT") == 1


async def test_to_have_none_free_is_an_answer_and_no_failure(
    guarded: GuardedProvider, adapter: HttpExitProvider, server: ProviderServer
) -> None:
    server.always = Fault.NONE_FREE
    with pytest.raises(NoneFree):
        await adapter.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    for _ in range(10):
        with pytest.raises(ExitUnavailable, match="has no exit free"):
            await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert server.counted("PUT") == 11
    assert guarded.available
    assert not guarded.is_passed_over()


async def test_a_demand_that_is_refused_says_nothing_of_the_others(
    guarded: GuardedProvider, server: ProviderServer
) -> None:
    await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    server.always = Fault.REFUSED
    for _ in range(10):
        with pytest.raises(ExitUnavailable, match="status 403"):
            await guarded.take(uuids.uuid7(), ORGANIZATION, "nowhere", 60.0)
    assert not guarded.is_passed_over()
    assert (guarded.available, guarded.last_error) == (True, "take: status 403")
    # A refusal of the rest is one of us, and so is that of our token.
    for _ in range(5):
        with pytest.raises(ExitUnavailable):
            await guarded.health()
    assert guarded.is_passed_over()


async def test_a_refused_token_passes_the_provider_over(
    config: ExitProviderConfig, server: ProviderServer, tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "other").write_text("another")
    adapter = HttpExitProvider(config.model_copy(update={"token_file": tmp_path / "other"}))
    stranger = GuardedProvider("vpn", adapter, Circuit(3.0, clock))
    for _ in range(5):
        with pytest.raises(ExitUnavailable, match="status 401"):
            await stranger.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert stranger.is_passed_over()
    await stranger.close()


@pytest.mark.parametrize(
    ("faults", "may_be_held"),
    [
        ([Fault.NONE_FREE], False),
        ([Fault.REFUSED], False),
        ([Fault.CUT, Fault.NONE_FREE], True),
        ([Fault.CUT, Fault.REFUSED], True),
        ([Fault.GARBAGE], True),
        ([Fault.EARLY], True),
        ([Fault.BROKEN] * 3, True),
    ],
    ids=lambda value: "-".join(fault.name for fault in value) if isinstance(value, list) else str(value),
)
async def test_a_failure_says_whether_an_exit_may_be_held(
    guarded: GuardedProvider, server: ProviderServer, faults: list[Fault], may_be_held: bool
) -> None:
    server.faults.extend(faults)
    with pytest.raises(ExitUnavailable) as caught:
        await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert caught.value.may_be_held == may_be_held
    assert not server.faults


async def test_a_provider_that_is_passed_over_rests_until_a_probe_is_due(
    guarded: GuardedProvider, server: ProviderServer, clock: Clock
) -> None:
    assert not guarded.is_resting()
    server.always = Fault.BROKEN
    for _ in range(5):
        with pytest.raises(ExitUnavailable):
            await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert guarded.is_resting()
    with pytest.raises(ExitUnavailable, match="passed over") as caught:
        await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert not caught.value.may_be_held
    clock.now = 4.0
    assert not guarded.is_resting()
    assert guarded.is_passed_over()


async def test_a_failing_provider_is_passed_over_and_probed_by_one_call(
    guarded: GuardedProvider, server: ProviderServer, clock: Clock
) -> None:
    async def take() -> str:
        try:
            return (await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)).exit_ip
        except ExitUnavailable:
            return ""

    server.always = Fault.BROKEN
    await asyncio.gather(*(take() for _ in range(8)))
    assert guarded.is_passed_over()
    before = len(server.calls)
    assert await asyncio.gather(*(take() for _ in range(50))) == [""] * 50
    assert len(server.calls) == before
    # Its time has come, and it still fails: one call asks for its health.
    clock.now = 4.0
    assert await asyncio.gather(*(take() for _ in range(20))) == [""] * 20
    assert [call.path for call in server.calls[before:]] == ["/api/v1/health"]
    # It is well: one call asks for its health, and work goes on.
    server.always = None
    clock.now = 8.0
    assert any(await asyncio.gather(*(take() for _ in range(20))))
    assert server.counted("GET", "/v1/health") == 2
    assert not guarded.is_passed_over()
    assert await take()


async def test_a_probe_that_is_cancelled_leaves_the_next_to_another(
    guarded: GuardedProvider, server: ProviderServer, clock: Clock
) -> None:
    server.always = Fault.BROKEN
    for _ in range(5):
        with pytest.raises(ExitUnavailable):
            await guarded.take(uuids.uuid7(), ORGANIZATION, "", 60.0)
    assert guarded.is_passed_over()
    clock.now = 4.0
    server.always = Fault.HANG
    probe = asyncio.ensure_future(guarded.health())
    before = len(server.calls)
    while len(server.calls) == before:
        await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    server.always = None
    await guarded.health()
    assert not guarded.is_passed_over()


async def test_held_leases_are_paged_and_an_endless_list_is_a_fault(
    guarded: GuardedProvider, server: ProviderServer, monkeypatch: pytest.MonkeyPatch, adapter: HttpExitProvider
) -> None:
    keys = sorted(uuids.uuid7() for _ in range(7))
    for key in keys:
        server.hold(key)
    server.hold(uuids.uuid7(), holder="somebody-else")
    server.page = 3
    assert [page async for page in guarded.pages()] == [keys[:3], keys[3:6], keys[6:]]

    async def again(after: UUID | None) -> list[UUID]:
        return keys[:3]

    monkeypatch.setattr(adapter, "held", again)
    pages = guarded.pages()
    assert await anext(pages) == keys[:3]
    with pytest.raises(ExitUnavailable, match="not in order"):
        await anext(pages)


@pytest.fixture(scope="module")
def document() -> Any:
    """The contract, read by a program at hand that reads YAML."""
    command: list[str | Path] = [Path(sys.executable).with_name("buf"), "convert", "--type", "google.protobuf.Struct"]
    command += ["--from", DOCUMENT, "--to", "-#format=json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


async def test_the_document_says_what_the_adapter_sends(
    adapter: HttpExitProvider, server: ProviderServer, document: Any
) -> None:
    schemas = document["components"]["schemas"]
    key = uuids.uuid7()
    exit_ = await adapter.take(key, ORGANIZATION, "kr", 60.0)
    await adapter.held(key)
    await adapter.held(None)
    await adapter.health()
    await adapter.give_back(key)
    documented = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
        if method != "parameters"
    }
    sent = {
        (call.method, call.path.removeprefix("/api").replace(str(key), "{allocation_key}")) for call in server.calls
    }
    assert sent == documented
    for call in server.calls:
        assert call.headers["Authorization"].startswith("Bearer ")
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"

    (put,) = (call for call in server.calls if call.method == "PUT")
    demand = schemas["Demand"]
    assert set(put.body) == set(demand["required"]) == set(demand["properties"])
    types = {"string": str, "integer": int}
    for name, value in put.body.items():
        kind = demand["properties"][name].get("type") or schemas["Holder"]["type"]
        assert type(value) is types[kind], name
    listing = document["paths"]["/v1/leases"]["get"]["parameters"]
    queries = [set(call.query) for call in server.calls if call.path.endswith("/leases")]
    assert set.union(*queries) == {parameter["name"] for parameter in listing}
    assert set.intersection(*queries) == {parameter["name"] for parameter in listing if parameter.get("required")}

    # Each field that the document requires is needed, and what it allows beyond is not.
    answer = {"exit_ip": exit_.exit_ip, "endpoint": exit_.endpoint, "region": "", "expires_at": "2099-01-01T00:00:00Z"}
    assert set(answer) == set(schemas["Exit"]["required"]) == set(schemas["Exit"]["properties"])
    server.answers.append({**answer, "more": 1})
    assert (await adapter.take(key, ORGANIZATION, "", 60.0)).exit_ip == exit_.exit_ip
    for name in answer:
        server.answers.append({other: value for other, value in answer.items() if other != name})
        with pytest.raises(ProviderFault, match=name):
            await adapter.take(key, ORGANIZATION, "", 60.0)
