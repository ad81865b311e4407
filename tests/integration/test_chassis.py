"""The chassis from outside: authentication, roles, errors, deadlines, health, reflection, drain, start-up faults."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from muster.allocator.v1 import work_pb2, work_pb2_grpc
from prometheus_client import REGISTRY

from services import metrics
from services.call import Role, current
from services.chassis import Chassis
from services.config import MetricsConfig, PostgresConfig, ServiceConfig
from services.errors import DatabaseUnavailable, InvalidApiKey, Overloaded, StartupError
from services.identity.keys import KeyStore
from services.migrations import IDENTITY, migrate
from services.postgres import Database
from tests.support.postgres import PostgresServer, TemplateDatabases

SERVICE = "muster.allocator.v1.WorkService"


class Probe(work_pb2_grpc.WorkServiceServicer):
    """A servicer that does what a test asks of it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.calls: list[Any] = []

    async def RenewLeases(self, request: Any, context: Any) -> work_pb2.RenewLeasesResponse:
        self.calls.append(current())
        return work_pb2.RenewLeasesResponse()

    async def ReleaseLeases(self, request: Any, context: Any) -> work_pb2.ReleaseLeasesResponse:
        raise RuntimeError("a secret detail")

    async def SubmitResults(self, request: Any, context: Any) -> work_pb2.SubmitResultsResponse:
        raise Overloaded("full", retry_after_seconds=0.25, queue="q")

    async def Heartbeat(self, request: Any, context: Any) -> work_pb2.HeartbeatResponse:
        self.entered.set()
        await self.release.wait()
        return work_pb2.HeartbeatResponse(drain=True)

    async def WorkStream(self, requests: Any, context: Any) -> AsyncIterator[work_pb2.WorkStreamResponse]:
        async for request in requests:
            if request.sequence == 13:
                raise Overloaded("unlucky", retry_after_seconds=1)
            yield work_pb2.WorkStreamResponse(sequence=request.sequence)


class Bench:
    """A chassis with the probe, and what a test needs to call it."""

    def __init__(self, chassis: Chassis[Any], probe: Probe, channel: grpc.aio.Channel, keys: dict[Role, str]) -> None:
        self.chassis = chassis
        self.probe = probe
        self.channel = channel
        self.stub = work_pb2_grpc.WorkServiceStub(channel)
        self.keys = keys

    def metadata(self, role: Role, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.keys[role]}"), *more)


@pytest.fixture
def identity_database(
    postgres_server: PostgresServer, template_databases: TemplateDatabases
) -> Callable[[], AbstractContextManager[str]]:
    def prepare(name: str) -> None:
        migrate(IDENTITY, postgres_server.dsn(name))

    return lambda: template_databases.fresh("identity_only", prepare)


@pytest.fixture
async def bench(
    postgres_server: PostgresServer, identity_database: Callable[[], AbstractContextManager[str]]
) -> AsyncIterator[Bench]:
    with identity_database() as name:
        config = ServiceConfig(
            postgres=PostgresConfig.model_validate({"dsn": postgres_server.dsn(name), "pool_min": 0})
        )
        database = await Database.connect(config.postgres, "test")
        store = KeyStore(database)
        keys = {role: (await store.create("acme", role, time_zone="Asia/Seoul"))[1] for role in Role}
        await store.create("globex", Role.WORKER)
        probe = Probe()  # type: ignore[abstract]  # one method is left out on purpose

        async def bind(chassis: Chassis[Any], _: ServiceConfig) -> None:
            chassis.add(
                work_pb2_grpc.add_WorkServiceServicer_to_server,
                probe,
                work_pb2.DESCRIPTOR.services_by_name["WorkService"],
                Role.WORKER,
                ReleaseLeases=Role.OPERATOR,
            )

        chassis = Chassis("allocator", config)
        address = await chassis.start(bind)
        async with grpc.aio.insecure_channel(address) as channel:
            yield Bench(chassis, probe, channel, keys)
        await chassis.drain()
        await database.close()


async def refused(call: Awaitable[Any]) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """Returns the error of a call and its details by type name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(cast(Any, caught.value))
    found: dict[str, Any] = {}
    for packed in status.details if status else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.RequestInfo):
            detail = kind()
            if packed.Unpack(detail):
                found[kind.__name__] = detail
    return caught.value, found


async def test_a_call_knows_its_principal_request_and_trace(bench: Bench) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await bench.stub.RenewLeases(
        work_pb2.RenewLeasesRequest(),
        metadata=bench.metadata(Role.OPERATOR, ("x-request-id", "r-1"), ("traceparent", trace)),
        timeout=5,
    )
    [call] = bench.probe.calls
    assert (call.principal.role, call.principal.time_zone) == (Role.OPERATOR, "Asia/Seoul")
    assert (call.request_id, call.traceparent) == ("r-1", trace)
    assert 0 < call.remaining_seconds() < 5


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer nonsense"),),
        (("authorization", "Bearer muster_" + "A" * 43),),
        (("authorization", "Basic dXNlcjpwYXNz"),),
        (("authorization", "Bearer " + "x" * 5000),),
    ],
)
async def test_without_a_valid_key_nothing_is_told(bench: Bench, metadata: Any) -> None:
    error, details = await refused(bench.stub.RenewLeases(work_pb2.RenewLeasesRequest(), metadata=metadata, timeout=5))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details["ErrorInfo"].reason == "INVALID_API_KEY"
    assert bench.probe.calls == []


async def test_a_role_below_the_methods_is_refused(bench: Bench) -> None:
    error, details = await refused(
        bench.stub.ReleaseLeases(work_pb2.ReleaseLeasesRequest(), metadata=bench.metadata(Role.WORKER), timeout=5)
    )
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert dict(details["ErrorInfo"].metadata) == {"role": "worker", "needs": "operator"}


async def test_only_a_service_acts_for_another_organization(bench: Bench) -> None:
    request = work_pb2.RenewLeasesRequest()
    await bench.stub.RenewLeases(request, metadata=bench.metadata(Role.WORKER), timeout=5)
    own = bench.probe.calls[-1].principal.organization_id
    stranger = ("muster-organization", "11111111-1111-4111-8111-111111111111")
    await bench.stub.RenewLeases(request, metadata=bench.metadata(Role.ADMIN, stranger), timeout=5)
    assert bench.probe.calls[-1].principal.organization_id == own
    error, _ = await refused(
        bench.stub.RenewLeases(request, metadata=bench.metadata(Role.SERVICE, stranger), timeout=5)
    )
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    acting = ("muster-organization", str(own))
    await bench.stub.RenewLeases(request, metadata=bench.metadata(Role.SERVICE, acting), timeout=5)
    assert bench.probe.calls[-1].principal.time_zone == "Asia/Seoul"


async def test_a_fault_of_our_own_tells_only_the_request_id(bench: Bench) -> None:
    error, details = await refused(
        bench.stub.ReleaseLeases(
            work_pb2.ReleaseLeasesRequest(), metadata=bench.metadata(Role.ADMIN, ("x-request-id", "r-2")), timeout=5
        )
    )
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert details["RequestInfo"].request_id == "r-2"


async def test_a_domain_error_carries_reason_metadata_and_retry(bench: Bench) -> None:
    error, details = await refused(
        bench.stub.SubmitResults(work_pb2.SubmitResultsRequest(), metadata=bench.metadata(Role.WORKER), timeout=5)
    )
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["ErrorInfo"].domain == "muster"
    assert dict(details["ErrorInfo"].metadata) == {"queue": "q"}
    assert details["RetryInfo"].retry_delay.nanos == 250_000_000


async def test_a_call_without_time_is_not_begun(bench: Bench) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.stub.RenewLeases(work_pb2.RenewLeasesRequest(), metadata=bench.metadata(Role.WORKER), timeout=0.004)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert bench.probe.calls == []


async def test_a_method_that_is_not_served_is_unimplemented(bench: Bench) -> None:
    error, details = await refused(
        bench.stub.AllocateWork(work_pb2.AllocateWorkRequest(), metadata=bench.metadata(Role.WORKER), timeout=5)
    )
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details["ErrorInfo"].reason == "METHOD_UNKNOWN"


async def test_streams_have_the_same_wrapper(bench: Bench) -> None:
    async def requests() -> AsyncIterator[work_pb2.WorkStreamRequest]:
        for sequence in (1, 2, 13):
            yield work_pb2.WorkStreamRequest(sequence=sequence)

    stream = bench.stub.WorkStream(requests(), metadata=bench.metadata(Role.WORKER), timeout=5)
    answered = [await anext(aiter(stream)), await anext(aiter(stream))]
    assert [response.sequence for response in answered] == [1, 2]
    error, details = await refused(_first(stream))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["RetryInfo"].retry_delay.seconds == 1
    # Without requests: a client that is writing when it is refused may see its own write fail instead.
    error, details = await refused(_first(bench.stub.WorkStream(timeout=5)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details["ErrorInfo"].reason == "INVALID_API_KEY"


async def _first(stream: Any) -> Any:
    async for response in stream:
        return response
    return None


async def test_calls_are_counted_by_method_and_code(bench: Bench) -> None:
    def counted(code: str) -> float:
        labels = {"service": SERVICE, "method": "RenewLeases", "code": code}
        return REGISTRY.get_sample_value("muster_rpc_total", labels) or 0.0

    before = counted("OK"), counted("UNAUTHENTICATED")
    await bench.stub.RenewLeases(work_pb2.RenewLeasesRequest(), metadata=bench.metadata(Role.WORKER), timeout=5)
    await refused(bench.stub.RenewLeases(work_pb2.RenewLeasesRequest(), timeout=5))
    assert (counted("OK") - before[0], counted("UNAUTHENTICATED") - before[1]) == (1, 1)


async def test_health_reflection_and_channelz_are_served(bench: Bench) -> None:
    # The stubs of these packages are typed for blocking channels.
    channel: Any = bench.channel
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    names = [
        service.name
        async for response in reflection.ServerReflectionInfo(listing, timeout=5)
        for service in response.list_services_response.service
    ]
    assert SERVICE in names
    channels: Any = channelz_pb2_grpc.ChannelzStub(channel)
    servers = await channels.GetServers(channelz_pb2.GetServersRequest(), timeout=5)
    assert len(servers.server) >= 1


async def test_drain_lets_calls_finish_and_then_closes(bench: Bench) -> None:
    closed: list[str] = []

    async def close(name: str) -> None:
        closed.append(name)

    bench.chassis.on_close("first", lambda: close("first"))
    bench.chassis.on_close("second", lambda: close("second"))
    call = asyncio.ensure_future(
        bench.stub.Heartbeat(work_pb2.HeartbeatRequest(), metadata=bench.metadata(Role.WORKER), timeout=10)
    )
    await bench.probe.entered.wait()
    draining = asyncio.create_task(bench.chassis.drain())
    await bench.chassis.draining.wait()
    bench.probe.release.set()
    assert (await call).drain
    await draining
    await bench.chassis.drain()
    assert closed == ["second", "first"]


async def test_a_background_loop_that_fails_stops_the_process(bench: Bench) -> None:
    async def loop() -> None:
        raise RuntimeError("broken")

    bench.chassis.run_loop("broken", loop)
    await asyncio.wait_for(bench.chassis.draining.wait(), 5)
    assert bench.chassis.failed


async def test_revoked_keys_are_refused_and_remembered_ones_outlive_the_database(
    postgres_server: PostgresServer, identity_database: Callable[[], AbstractContextManager[str]]
) -> None:
    from services.identity import keys

    with identity_database() as name:
        config = PostgresConfig.model_validate({"dsn": postgres_server.dsn(name), "pool_min": 0})
        database = await Database.connect(config, "test")
        store = KeyStore(database)
        key_id, key = await store.create("acme", Role.WORKER)
        authenticator = keys.Authenticator(store)
        assert (await authenticator.authenticate(f"Bearer {key}")).role is Role.WORKER
        assert await store.revoke(key_id)
        # Trusted for a while, then looked up again.
        authenticator._known[f"Bearer {key}"] = (0.0, authenticator._known[f"Bearer {key}"][1])
        with pytest.raises(InvalidApiKey):
            await authenticator.authenticate(f"Bearer {key}")
        _, other = await store.create("acme", Role.OPERATOR)
        known = await authenticator.authenticate(f"Bearer {other}")
        await database.close()
        authenticator._known[f"Bearer {other}"] = (asyncio.get_running_loop().time() - 1, known)
        assert await authenticator.authenticate(f"Bearer {other}") == known


async def test_a_port_in_use_is_a_start_up_error(
    postgres_server: PostgresServer, identity_database: Callable[[], AbstractContextManager[str]]
) -> None:
    async def bind(_: Chassis[Any], __: ServiceConfig) -> None:
        return None

    with identity_database() as name, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        config = ServiceConfig.model_validate(
            {"postgres": {"dsn": postgres_server.dsn(name)}, "grpc": {"listen": listen}}
        )
        with pytest.raises(StartupError, match=rf"port {listen} cannot be used"):
            await Chassis("allocator", config).start(bind)
        with pytest.raises(StartupError, match=rf"metrics port {listen} cannot be used"):
            metrics.serve(MetricsConfig(listen=listen))


async def test_a_database_that_is_not_there_is_a_start_up_error() -> None:
    async def bind(_: Chassis[Any], __: ServiceConfig) -> None:
        return None

    config = ServiceConfig.model_validate({"postgres": {"dsn": "postgresql://nobody@127.0.0.1:1/none"}})
    with pytest.raises(StartupError, match="does not answer"):
        await Chassis("allocator", config).start(bind)


async def test_a_database_that_goes_away_during_the_start_is_a_start_up_error(
    postgres_server: PostgresServer, identity_database: Callable[[], AbstractContextManager[str]]
) -> None:
    closed = []

    async def bind(chassis: Chassis[Any], _: ServiceConfig) -> None:
        async def close() -> None:
            closed.append(True)

        chassis.on_close("part", close)
        raise DatabaseUnavailable("the database does not answer (ConnectionRefusedError)")

    with identity_database() as name:
        config = ServiceConfig.model_validate({"postgres": {"dsn": postgres_server.dsn(name)}})
        with pytest.raises(StartupError, match=r"^the start lost the database .*: start again when it is back$"):
            await Chassis("allocator", config).start(bind)
    assert closed


async def test_pending_migrations_are_a_start_up_error(postgres_server: PostgresServer) -> None:
    async def bind(_: Chassis[Any], __: ServiceConfig) -> None:
        return None

    name = postgres_server.create_database("empty")
    try:
        config = ServiceConfig.model_validate({"postgres": {"dsn": postgres_server.dsn(name)}})
        with pytest.raises(StartupError, match="run `muster migrate`"):
            await Chassis("allocator", config).start(bind)
    finally:
        postgres_server.drop_database(name)
