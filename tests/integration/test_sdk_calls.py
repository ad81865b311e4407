"""Calls over a real server: what is repeated, for how long, and what comes back when it is refused."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from muster import Client, ExitSpec, RetryPolicy, SlotSpec, errors
from muster.allocator.v1 import admin_pb2, exit_pb2, slot_pb2, work_pb2
from muster.bundles import COOKIES, STATE
from muster.persona_store.v1 import bundle_pb2, checkout_pb2, persona_pb2
from muster.personas import PersonaCriteria, UseOutcome
from muster.results import Lease
from muster.session_tracker.v1 import session_pb2
from muster.work import BlockerKind, ClientIdentity

from services.errors import FieldViolation, InvalidField
from tests.support.scripted import ScriptedServer, Status, refusal

PC = ClientIdentity("pc-1")
NOTHING = work_pb2.AllocateWorkResponse(
    no_work=work_pb2.NoWork(blocker=work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED, message="all taken")
)
SLOT = slot_pb2.Slot(slot_id="s", spec=slot_pb2.SlotSpec(keyword="k", start_date="2026-01-01", end_date="2026-12-31"))
QUICK = RetryPolicy(call_seconds=2.0, total_seconds=5.0)


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    made = ScriptedServer()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[Client]:
    there = server.address
    async with Client(
        api_key="k" * 40,
        allocator=there,
        persona_store=there,
        session_tracker=there,
        archiver=there,
        policy=QUICK,
    ) as made:
        yield made


async def test_a_call_is_repeated_with_the_same_request_id_and_key_until_it_succeeds(
    server: ScriptedServer, client: Client
) -> None:
    server.on(
        "WorkService/AllocateWork",
        Status(grpc.StatusCode.UNAVAILABLE, "gone"),
        refusal("DRAINING", retry_after=0.01),
        refusal("OVERLOADED", retry_after=0.01),
        Status(grpc.StatusCode.DEADLINE_EXCEEDED),
        Status(grpc.StatusCode.CANCELLED, "the server stopped"),
        NOTHING,
    )
    answer = await client.work.allocate(PC)
    assert answer.no_work is not None
    assert answer.no_work.blocker is BlockerKind.QUOTA_EXHAUSTED
    ids = [request.request_id for request in server.calls["WorkService/AllocateWork"]]
    assert len(ids) == 6
    assert len(set(ids)) == 1
    assert {metadata["authorization"] for metadata in server.metadata["WorkService/AllocateWork"]} == {
        "Bearer " + "k" * 40
    }
    await client.work.allocate(PC)
    assert server.calls["WorkService/AllocateWork"][-1].request_id != ids[0]


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (refusal("STALE_VERSION"), errors.StaleVersion),
        (refusal("EXIT_LIMIT_REACHED"), errors.LimitReached),
        (refusal("INVALID_API_KEY"), errors.Unauthenticated),
        (refusal("SLOT_NOT_FOUND", slot_id="s"), errors.NotFound),
        (Status(grpc.StatusCode.INTERNAL, "boom"), errors.ServiceFault),
    ],
)
async def test_what_time_does_not_mend_is_not_repeated(
    server: ScriptedServer, client: Client, behaviour: Any, kind: type[errors.MusterError]
) -> None:
    server.on("WorkService/AllocateWork", behaviour)
    with pytest.raises(kind):
        await client.work.allocate(PC)
    assert len(server.calls["WorkService/AllocateWork"]) == 1


async def test_the_delay_the_service_asks_for_is_kept(server: ScriptedServer, client: Client) -> None:
    server.on("WorkService/AllocateWork", refusal("DATABASE_UNAVAILABLE", retry_after=0.4), NOTHING)
    clock = asyncio.get_running_loop().time
    began = clock()
    await client.work.allocate(PC)
    assert 0.4 <= clock() - began < 2


async def test_a_delay_past_the_budget_ends_the_call_at_once(server: ScriptedServer, client: Client) -> None:
    server.on("WorkService/AllocateWork", refusal("DATABASE_UNAVAILABLE", "down", retry_after=3600))
    clock = asyncio.get_running_loop().time
    began = clock()
    with pytest.raises(errors.Unavailable) as caught:
        await client.work.allocate(PC)
    assert clock() - began < 2
    assert caught.value.retry_after == timedelta(hours=1)


async def test_an_update_outlives_a_restart_of_the_service(server: ScriptedServer, client: Client) -> None:
    server.on(
        "SlotService/UpdateSlot",
        Status(grpc.StatusCode.UNAVAILABLE, "connection reset"),
        refusal("DRAINING", retry_after=0.01),
        slot_pb2.UpdateSlotResponse(slot=SLOT),
    )
    spec = SlotSpec("k", date(2026, 1, 1), date(2026, 12, 31), 5)
    assert (await client.slots.update("s", spec, ["daily_quota"], etag="e1")).slot_id == "s"
    first, *others = server.calls["SlotService/UpdateSlot"]
    assert others == [first] * 2
    assert (list(first.update_mask.paths), first.etag) == (["daily_quota"], "e1")


REQUEST_ID = "0198c0de-0000-7000-8000-00000000000f"
ACT: dict[str, Any] = {"reason": "r"}
NAMED: dict[str, tuple[Callable[..., Awaitable[Any]], Message]] = {
    "AdminService/RevokeLeases": (
        lambda client, **named: client.acts.revoke_leases(["a"], **ACT, **named),
        admin_pb2.RevokeLeasesResponse(),
    ),
    "AdminService/ReleaseByAge": (
        lambda client, **named: client.acts.release_by_age(timedelta(hours=1), **ACT, **named),
        admin_pb2.ReleaseByAgeResponse(),
    ),
    "AdminService/ReopenQuota": (
        lambda client, **named: client.acts.reopen_quota("s", units=100, **ACT, **named),
        admin_pb2.ReopenQuotaResponse(),
    ),
    "AdminService/AcceptQuarantinedResults": (
        lambda client, **named: client.acts.accept_quarantined(["a"], **ACT, **named),
        admin_pb2.AcceptQuarantinedResultsResponse(),
    ),
    "AdminService/DiscardQuarantinedResults": (
        lambda client, **named: client.acts.discard_quarantined(["a"], **ACT, **named),
        admin_pb2.DiscardQuarantinedResultsResponse(),
    ),
    "SlotService/CreateSlot": (
        lambda client, **named: client.slots.create(SlotSpec("k", date(2026, 1, 1), date(2026, 12, 31), 5), **named),
        slot_pb2.CreateSlotResponse(slot=SLOT),
    ),
    "ExitService/ToggleExit": (
        lambda client, **named: client.exits.toggle("e", **named),
        exit_pb2.ToggleExitResponse(),
    ),
    "PersonaService/CreatePersona": (
        lambda client, **named: client.personas.create(b"{}", **named),
        persona_pb2.CreatePersonaResponse(),
    ),
    "PersonaService/RollbackBundle": (
        lambda client, **named: client.personas.rollback("p", 2, **named),
        persona_pb2.RollbackBundleResponse(),
    ),
}


@pytest.mark.parametrize("method", NAMED)
async def test_a_call_is_made_again_by_hand_under_its_request_id(
    server: ScriptedServer, client: Client, method: str
) -> None:
    call, answer = NAMED[method]
    server.on(method, refusal("DATABASE_UNAVAILABLE", retry_after=3600), answer)
    with pytest.raises(errors.Unavailable):
        await call(client, request_id=REQUEST_ID)
    await call(client, request_id=REQUEST_ID)
    await call(client)
    first, second, other = (_request_id(request) for request in server.calls[method])
    assert first == second == REQUEST_ID
    assert uuid.UUID(other) != uuid.UUID(REQUEST_ID)


def _request_id(request: Any) -> str:
    found: str = request.act.request_id if hasattr(request, "act") else request.request_id
    return found


async def test_an_answer_that_never_comes_is_a_deadline_and_then_an_end(server: ScriptedServer) -> None:
    async def hang(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    server.on("WorkService/AllocateWork", hang)
    policy = RetryPolicy(call_seconds=0.2, total_seconds=0.7)
    async with Client(api_key="k" * 40, allocator=server.address, policy=policy) as client:
        clock = asyncio.get_running_loop().time
        began = clock()
        with pytest.raises(errors.DeadlineExceeded):
            await client.work.allocate(PC)
        assert clock() - began < 2
    assert len(server.calls["WorkService/AllocateWork"]) >= 2


async def test_nobody_there_names_the_service_and_its_address(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    policy = RetryPolicy(call_seconds=0.5, total_seconds=0.5)
    async with Client(api_key="k" * 40, allocator=address, policy=policy) as client:
        with pytest.raises(errors.Unavailable, match=f"the allocator at {address}"):
            await client.insight.totals()
        with pytest.raises(errors.NotConfigured, match="MUSTER_ARCHIVER"):
            await client.archive.policies()


async def test_a_service_that_was_restarted_is_found_again_by_the_call_in_hand(
    server: ScriptedServer, client: Client
) -> None:
    server.on("WorkService/AllocateWork", NOTHING)
    await client.work.allocate(PC)
    port = int(server.address.rpartition(":")[2])
    await server.stop()
    call = asyncio.create_task(client.work.allocate(PC))
    again = ScriptedServer()
    again.on("WorkService/AllocateWork", NOTHING)
    await again.start(port)
    try:
        assert (await call).no_work is not None
    finally:
        await again.stop()


async def test_violations_metadata_and_message_are_restored(server: ScriptedServer, client: Client) -> None:
    wrong = InvalidField([FieldViolation("spec.daily_quota", "must be from 1 to 1000000, is 0")])
    server.on("SlotService/CreateSlot", wrong)
    with pytest.raises(errors.InvalidField) as caught:
        await client.slots.create(SlotSpec("k", date(2026, 1, 1), date(2026, 1, 2), 0))
    assert caught.value.violations == (errors.FieldViolation("spec.daily_quota", "must be from 1 to 1000000, is 0"),)
    assert caught.value.metadata == {"fields": "spec.daily_quota"}


@pytest.mark.parametrize("trailing", [b"\xff\xff not a status", b""])
async def test_details_that_make_no_sense_leave_the_code(
    server: ScriptedServer, client: Client, trailing: bytes
) -> None:
    details = (("grpc-status-details-bin", trailing),)
    server.on("WorkService/AllocateWork", Status(grpc.StatusCode.NOT_FOUND, "who?", details))
    with pytest.raises(errors.NotFound, match="who"):
        await client.work.allocate(PC)


async def test_each_lease_of_a_batch_is_answered_for_itself(server: ScriptedServer, client: Client) -> None:
    moment = Timestamp(seconds=1_800_000_000)
    lost = work_pb2.ItemError(code=9, reason="LEASE_LOST", message="ran out")
    server.on(
        "WorkService/RenewLeases",
        work_pb2.RenewLeasesResponse(
            leases=[
                work_pb2.RenewedLease(allocation_key="a", expires_at=moment),
                work_pb2.RenewedLease(allocation_key="b", error=lost),
            ]
        ),
    )
    first, second = await client.work.renew([Lease("a", b"1" * 16), Lease("b", b"2" * 16)])
    assert first.error is None
    assert first.expires_at is not None
    assert first.expires_at.timestamp() == 1_800_000_000
    assert isinstance(second.error, errors.LeaseLost)
    assert second.expires_at is None


async def test_a_list_goes_from_page_to_page(server: ScriptedServer, client: Client) -> None:
    def page(names: list[str], token: str) -> exit_pb2.ListExitsResponse:
        exits = [exit_pb2.Exit(exit_id=name, spec=exit_pb2.ExitSpec(endpoint="http://p:1")) for name in names]
        return exit_pb2.ListExitsResponse(exits=exits, next_page_token=token)

    # A page may hold fewer than were asked for, even none, and not be the last one.
    pages = [page(["a", "b"], "t1"), refusal("DRAINING", retry_after=0.01), page([], "t2"), page(["c"], "")]
    server.on("ExitService/ListExits", *pages)
    assert [found.exit_id async for found in client.exits.list(page_size=1000)] == ["a", "b", "c"]
    assert [request.page_token for request in server.calls["ExitService/ListExits"]] == ["", "t1", "t1", "t2"]


async def test_a_toggle_and_exits_carry_what_was_said(server: ScriptedServer, client: Client) -> None:
    made = exit_pb2.Exit(exit_id="e", spec=exit_pb2.ExitSpec(endpoint="http://p:1", cap=20), use_count=3)
    server.on("ExitService/ToggleExit", exit_pb2.ToggleExitResponse(exit=made))
    server.on("ExitService/ImportExits", exit_pb2.ImportExitsResponse(exits=[made]))
    assert (await client.exits.toggle("e", reason="new address")).use_count == 3
    assert server.calls["ExitService/ToggleExit"][0].reason == "new address"
    (added,) = await client.exits.add([ExitSpec("http://p:1", "kr")])
    assert added.spec.cap == 20
    assert added.toggled_at is None


async def test_a_large_import_flows_and_a_refused_row_stops_no_other(server: ScriptedServer, client: Client) -> None:
    async def take(rows: Any, context: Any) -> AsyncIterator[slot_pb2.ImportSlotsResponse]:
        async for row in rows:
            answer = slot_pb2.ImportSlotsResponse(row=row.row, slot_id=f"slot-{row.row}", created=True)
            if row.row == 3:
                wrong = work_pb2.ItemError(code=3, reason="INVALID_FIELD", message="keyword: required")
                answer = slot_pb2.ImportSlotsResponse(row=row.row, error=wrong)
            yield answer

    server.on("SlotService/ImportSlots", take)
    spec = SlotSpec("k", date(2026, 1, 1), date(2026, 1, 2), 1, external_id="x")
    answers = [answer async for answer in client.slots.import_rows((row, spec) for row in range(2500))]
    assert len(answers) == 2500
    refused = [answer for answer in answers if answer.error]
    assert [answer.row for answer in refused] == [3]
    assert isinstance(refused[0].error, errors.InvalidField)


async def test_a_large_bundle_goes_in_chunks_and_is_checked(server: ScriptedServer, client: Client) -> None:
    stored: dict[str, bytes] = {}

    async def save(pieces: Any, context: Any) -> bundle_pb2.SaveBundleStreamResponse:
        name = ""
        async for piece in pieces:
            if piece.WhichOneof("piece") == "part":
                name = piece.part.name
                stored[name] = b""
            elif piece.WhichOneof("piece") == "data":
                assert len(piece.data) <= 2**20
                stored[name] += piece.data
        return bundle_pb2.SaveBundleStreamResponse(generation=persona_pb2.Generation(generation=7))

    def load(spoil: bool) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[bundle_pb2.LoadBundleStreamResponse]:
            yield bundle_pb2.LoadBundleStreamResponse(generation=7)
            for piece in server.calls["BundleService/SaveBundleStream"]:
                if piece.WhichOneof("piece") == "part":
                    yield bundle_pb2.LoadBundleStreamResponse(part=piece.part)
                elif piece.WhichOneof("piece") == "data":
                    data = bytes(len(piece.data)) if spoil else piece.data
                    yield bundle_pb2.LoadBundleStreamResponse(data=data)

        return answer

    large = bytes(range(256)) * 20_000
    server.on("BundleService/SaveBundleStream", save)
    saved = await client.bundles.save("p", b"t" * 16, {COOKIES: large, STATE: b"{}"})
    assert saved.generation == 7
    assert stored == {COOKIES: large, STATE: b"{}"}
    assert server.calls["BundleService/SaveBundleStream"][0].header.lease_token == b"t" * 16
    server.on("BundleService/LoadBundle", refusal("PART_TOO_LARGE"))
    server.on("BundleService/LoadBundleStream", load(spoil=False), load(spoil=True))
    loaded = await client.bundles.load("p")
    assert loaded.generation == 7
    assert loaded.parts == {COOKIES: large, STATE: b"{}"}
    assert loaded.state == {}
    assert loaded.history is None
    with pytest.raises(errors.DataLoss):
        await client.bundles.load("p")


async def test_a_save_that_is_repeated_keeps_its_request_id(server: ScriptedServer, client: Client) -> None:
    done = bundle_pb2.SaveBundleResponse(generation=persona_pb2.Generation(generation=2))
    server.on("BundleService/SaveBundle", refusal("OBJECT_STORE_UNAVAILABLE", retry_after=0.01), done)
    await client.bundles.save("p", b"t" * 16, {STATE: b"{}"})
    first, second = server.calls["BundleService/SaveBundle"]
    assert first.request_id == second.request_id


async def test_personas_are_checked_out_renewed_and_checked_in(server: ScriptedServer, client: Client) -> None:
    persona = persona_pb2.Persona(persona_id="p", status=persona_pb2.PERSONA_STATUS_ACTIVE, tags=["a"])
    check_out = checkout_pb2.CheckOut(persona=persona, holder="me", lease_token=b"t" * 16)
    none = checkout_pb2.ItemError(code=5, reason="NO_PERSONA_MATCHES", metadata={"held": "3"})
    server.on(
        "CheckOutService/CheckOutPersonas",
        checkout_pb2.CheckOutPersonasResponse(results=[checkout_pb2.CheckOutResult(check_out=check_out)]),
        checkout_pb2.CheckOutPersonasResponse(results=[checkout_pb2.CheckOutResult(error=none)]),
    )
    held = await client.personas.check_out("me", "p", timedelta(minutes=5))
    assert held.persona.tags == ("a",)
    assert "tttt" not in repr(held)
    with pytest.raises(errors.NoPersonaMatches) as caught:
        await client.personas.check_out("me", PersonaCriteria(tags=["b"]), timedelta(minutes=5))
    assert caught.value.metadata == {"held": "3"}
    lost = checkout_pb2.ItemError(code=9, reason="CHECK_OUT_LOST")
    server.on(
        "CheckOutService/RenewCheckOuts",
        checkout_pb2.RenewCheckOutsResponse(results=[checkout_pb2.RenewCheckOutResult(error=lost)]),
    )
    with pytest.raises(errors.CheckOutLost):
        await client.personas.renew(held, timedelta(minutes=5))
    server.on("CheckOutService/CheckInPersonas", checkout_pb2.CheckInPersonasResponse(checked_in=[False]))
    assert await client.personas.check_in("me", UseOutcome.SUCCEEDED) is False


async def test_a_watch_goes_on_where_it_was(server: ScriptedServer, client: Client) -> None:
    async def first(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield session_pb2.WatchSessionsResponse(epoch="e1", offset=4, snapshot=True)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    async def second(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield session_pb2.WatchSessionsResponse(epoch="e1", offset=5, removed=["s"])

    server.on("WatchService/WatchSessions", first, Status(grpc.StatusCode.UNAVAILABLE), second)
    changes = [change async for change in client.sessions.watch()]
    assert [(change.snapshot, change.offset) for change in changes] == [(True, 4), (False, 5)]
    resumed = server.calls["WatchService/WatchSessions"][-1]
    assert (resumed.epoch, resumed.offset) == ("e1", 4)


async def test_the_key_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("  secret\n")
    for environ in ({"MUSTER_API_KEY": "secret"}, {"MUSTER_API_KEY_FILE": str(file)}):
        client = Client.from_environment({**environ, "MUSTER_ALLOCATOR": "127.0.0.1:1"})
        assert client.work._transport.metadata == (("authorization", "Bearer secret"),)
        assert client.work._transport.address == "127.0.0.1:1"
    for environ, said in (
        ({}, "MUSTER_API_KEY"),
        ({"MUSTER_API_KEY_FILE": str(tmp_path / "none")}, "cannot be read"),
        ({"MUSTER_API_KEY_FILE": str(tmp_path)}, "cannot be read"),
    ):
        with pytest.raises(errors.NotConfigured, match=said):
            Client.from_environment(environ)
    file.write_text("\n")
    with pytest.raises(errors.NotConfigured, match="is empty"):
        Client.from_environment({"MUSTER_API_KEY_FILE": str(file)})
