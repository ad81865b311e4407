"""Every method of the allocator, a request that is well formed, and what to spoil in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from muster.allocator.v1 import admin_pb2, client_pb2, exit_pb2, insight_pb2, slot_pb2, target_pb2, work_pb2

from services import pages
from tests.support.allocator import spec
from tests.support.bad_input import (
    ID,
    SETTING_FAULTS,
    BadCall,
    Fault,
    bad_client,
    bad_day,
    bad_duration,
    bad_id,
    bad_ids,
    bad_number,
    bad_text,
    seconds,
)

_PAGE: list[Fault] = [("page_token", "!"), ("page_token", "W10="), ("page_token", pages.encode(["x"], "another scope"))]
_ACT: list[Fault] = [("act", None), *bad_id("act.request_id"), *bad_text("act.reason", 256, required=True)]
_LEASES: list[Fault] = [
    ("leases", []),
    ("leases", [work_pb2.Lease(allocation_key=ID, lease_token=bytes(16))] * 1001),
    *bad_id("leases.0.allocation_key"),
    ("leases.0.lease_token", b""),
    ("leases.0.lease_token", bytes(15)),
    ("leases.0.lease_token", bytes(17)),
]
_PERSONA: list[Fault] = [
    ("spec.persona.tags", [f"t{n}" for n in range(17)]),
    ("spec.persona.tags", [""]),
    ("spec.persona.tags", ["x" * 65]),
    ("spec.persona.tags", ["a", "a"]),
    *bad_text("spec.persona.region", 64),
    *bad_number("spec.persona.min_aging_level", 101, 2**32 - 1),
    *bad_number("spec.persona.cool_down_seconds", 31_536_001, 2**32 - 1),
]
SPEC: list[Fault] = [
    *bad_text("spec.keyword", 200, required=True),
    *bad_text("spec.code", 64),
    *bad_text("spec.target", 128),
    *bad_day("spec.start_date", required=True),
    *bad_day("spec.end_date", required=True),
    *bad_number("spec.daily_quota", 0, 1_000_001, 2**32 - 1),
    ("spec.settings", {f"s{n}": work_pb2.SettingValue(string_value="x" * 4000) for n in range(5)}),
    *bad_number("spec.priority", 1001, -1001, -(2**31)),
    *bad_number("spec.weight", 1001, 2**32 - 1),
    *_PERSONA,
    *bad_text("spec.exit_region", 64),
    *bad_text("spec.exit_provider", 128),
    ("spec.exit_provider", "none-of-the-configured"),
]
_SPEC_ALL = [*SPEC, ("spec", None), *bad_text("spec.external_id", 128), ("spec.end_date", "2019-12-31")]

_CLIENT = work_pb2.ClientIdentity(client_id="pc-1")
_LEASE = work_pb2.Lease(allocation_key=ID, lease_token=bytes(16))
_ACTING = admin_pb2.Act(request_id=ID, reason="because")
_SPEC = spec(persona=slot_pb2.PersonaNeed(tags=["a"]))


def _result(**values: Any) -> work_pb2.SubmitResultsRequest:
    values.setdefault("outcome", work_pb2.WORK_OUTCOME_FAILED)
    result = work_pb2.WorkResult(
        lease=_LEASE, execution_time=seconds(1), products=[work_pb2.Product(product_id="p")], **values
    )
    return work_pb2.SubmitResultsRequest(client=_CLIENT, results=[result])


def _updates() -> Iterator[BadCall]:
    """One field at a time: only what the mask names is looked at."""
    settings = [("spec.settings", fault) for fault in SETTING_FAULTS]
    texts = [(f"spec.{name}", "\0") for name in ("keyword", "code", "target", "exit_region", "exit_provider")]
    for fault in [*SPEC, *settings, *texts, ("spec.pacing", 99)]:
        request = slot_pb2.UpdateSlotRequest(
            slot_id=ID, spec=_SPEC, update_mask=FieldMask(paths=[fault[0].split(".")[1]])
        )
        yield BadCall("SlotService/UpdateSlot", request, [fault])


_WORK = [
    BadCall(
        "WorkService/AllocateWork",
        work_pb2.AllocateWorkRequest(request_id=ID, client=_CLIENT),
        [
            *bad_id("request_id"),
            *bad_client(),
            *bad_number("max_items", 257, 2**32 - 1),
            *bad_duration("wait", 30),
            *bad_text("target", 128),
            *bad_text("region", 64),
            ("traceparent", "00-xyz"),
            ("traceparent", f"00-{'0' * 32}-{'1' * 16}-01"),
            ("traceparent", f"01-{'1' * 32}-{'1' * 16}-01"),
        ],
    ),
    BadCall("WorkService/RenewLeases", work_pb2.RenewLeasesRequest(leases=[_LEASE]), _LEASES),
    BadCall(
        "WorkService/ReleaseLeases",
        work_pb2.ReleaseLeasesRequest(leases=[_LEASE]),
        [*_LEASES, *bad_text("reason", 256)],
    ),
    BadCall(
        "WorkService/SubmitResults",
        _result(),
        [
            *bad_client(),
            ("results", []),
            ("results", [_result().results[0]] * 257),
            (
                "results",
                [
                    _result(
                        error_message="x" * 1000, applied_settings={"n": work_pb2.SettingValue(string_value="x" * 4096)}
                    ).results[0]
                ]
                * 256
                * 5,
            ),
            ("results.0.lease", None),
            *((f"results.0.{path.replace('leases.0', 'lease')}", value) for path, value in _LEASES if "." in path),
            *bad_number("results.0.outcome", 0, 9),
            ("results.0.block_type", "captcha"),
            *bad_duration("results.0.execution_time", 86400, required=True),
            ("results.0.exit_ip", "300.1.1.1"),
            ("results.0.products", [work_pb2.Product(product_id="p")] * 1001),
            *bad_text("results.0.products.0.product_id", 256, required=True),
            *bad_text("results.0.products.0.title", 1024),
            *bad_text("results.0.products.0.url", 2048),
            *bad_duration("results.0.retry_after", 86400),
            *bad_text("results.0.error_message", 1024),
            *bad_duration("results.0.crawl_delay", 3600),
        ],
    ),
    BadCall(
        "WorkService/SubmitResults",
        _result(outcome=work_pb2.WORK_OUTCOME_BLOCKED, block_type="b"),
        bad_text("results.0.block_type", 64, required=True),
    ),
    BadCall("WorkService/Heartbeat", work_pb2.HeartbeatRequest(client=_CLIENT), bad_client()),
]
_SLOTS = [
    BadCall(
        "SlotService/CreateSlot",
        slot_pb2.CreateSlotRequest(request_id=ID, spec=_SPEC),
        [*bad_id("request_id"), *_SPEC_ALL],
    ),
    BadCall(
        "SlotService/CreateSlot",
        slot_pb2.CreateSlotRequest(request_id=ID, spec=spec(without_exit=True)),
        [("spec.exit_region", "kr"), ("spec.exit_provider", "vpn")],
    ),
    BadCall("SlotService/GetSlot", slot_pb2.GetSlotRequest(slot_id=ID), bad_id("slot_id")),
    BadCall(
        "SlotService/ListSlots",
        slot_pb2.ListSlotsRequest(),
        [
            *_PAGE,
            *bad_text("target", 128),
            *bad_text("keyword_prefix", 200),
            *bad_text("code", 64),
            *bad_text("external_id", 128),
        ],
    ),
    BadCall(
        "SlotService/UpdateSlot",
        slot_pb2.UpdateSlotRequest(slot_id=ID, spec=_SPEC, update_mask=FieldMask(paths=["keyword"])),
        [
            *bad_id("slot_id"),
            ("etag", "x" * 65),
            *bad_text("reason", 256),
            ("update_mask", None),
            ("update_mask", FieldMask(paths=["external_id"])),
            ("update_mask", FieldMask(paths=["nothing"])),
        ],
    ),
    *_updates(),
    *(
        BadCall(f"SlotService/{method}", request(slot_id=ID), [*bad_id("slot_id"), *bad_text("reason", 256)])
        for method, request in (("PauseSlot", slot_pb2.PauseSlotRequest), ("ResumeSlot", slot_pb2.ResumeSlotRequest))
    ),
    BadCall("SlotService/ListSlotHistory", slot_pb2.ListSlotHistoryRequest(slot_id=ID), [*_PAGE, *bad_id("slot_id")]),
]
_PROXY = exit_pb2.ExitSpec(endpoint="http://h:1")
_EXITS = [
    BadCall(
        "ExitService/ImportExits",
        exit_pb2.ImportExitsRequest(exits=[_PROXY]),
        [
            ("exits", []),
            ("exits", [exit_pb2.ExitSpec(endpoint=f"http://h:{n + 1}") for n in range(501)]),
            ("exits", [_PROXY] * 2),
            *(
                ("exits.0.endpoint", endpoint)
                for endpoint in (
                    "",
                    "h:1",
                    "ftp://h:1",
                    "http://h",
                    "http://h:0",
                    "http://h:65536",
                    "http://u:p@h:1",
                    "http://h:1/x",
                    f"http://{'h' * 510}:1",
                )
            ),
            *bad_text("exits.0.region", 64),
            *bad_number("exits.0.cap", 100_001, 2**32 - 1),
            *bad_number("exits.0.window_seconds", 1),
        ],
    ),
    BadCall(
        "ExitService/ImportExits",
        exit_pb2.ImportExitsRequest(
            exits=[
                exit_pb2.ExitSpec(endpoint="http://h:1", cap_mode=exit_pb2.EXIT_CAP_MODE_PER_WINDOW, window_seconds=1)
            ]
        ),
        bad_number("exits.0.window_seconds", 0, 86_401, 2**32 - 1),
    ),
    BadCall("ExitService/ListExits", exit_pb2.ListExitsRequest(), _PAGE),
    BadCall("ExitService/SetExitEnabled", exit_pb2.SetExitEnabledRequest(exit_id=ID), bad_id("exit_id")),
    BadCall(
        "ExitService/ToggleExit",
        exit_pb2.ToggleExitRequest(request_id=ID, exit_id=ID),
        [*bad_id("request_id"), *bad_id("exit_id"), *bad_text("reason", 256)],
    ),
    BadCall(
        "ExitService/ListExitHealth",
        exit_pb2.ListExitHealthRequest(),
        [*_PAGE, *bad_id("exit_id", required=False), *bad_text("target", 128)],
    ),
    BadCall(
        "ExitService/ClearExitHealth",
        exit_pb2.ClearExitHealthRequest(exit_id=ID),
        [*bad_id("exit_id"), *bad_text("target", 128)],
    ),
    BadCall("ExitService/ForecastExits", exit_pb2.ForecastExitsRequest(), bad_text("region", 64)),
    BadCall("ExitService/ListExitProviders", exit_pb2.ListExitProvidersRequest()),
    BadCall(
        "ExitService/ListExitToggles", exit_pb2.ListExitTogglesRequest(), [*_PAGE, *bad_id("exit_id", required=False)]
    ),
]
_POLICY = target_pb2.TargetPolicy(max_in_flight=1)
_TARGETS = [
    BadCall(
        "TargetService/SetTargetPolicy",
        target_pb2.SetTargetPolicyRequest(target="shop", policy=_POLICY),
        [
            *bad_text("target", 128, required=True),
            ("target", f"slot:{ID}"),
            ("policy", None),
            *bad_number("policy.max_in_flight", 1_000_001, 2**32 - 1),
            *bad_duration("policy.min_delay", 3600),
        ],
    ),
    BadCall("TargetService/ListTargets", target_pb2.ListTargetsRequest(), _PAGE),
    BadCall(
        "TargetService/HoldTarget",
        target_pb2.HoldTargetRequest(target="shop", duration=seconds(1)),
        [
            *bad_text("target", 128, required=True),
            *bad_duration("duration", 30 * 86400, required=True),
            ("duration", seconds(0)),
            *bad_text("reason", 256),
        ],
    ),
    BadCall(
        "TargetService/ResumeTarget",
        target_pb2.ResumeTargetRequest(target="shop"),
        bad_text("target", 128, required=True),
    ),
]
_CLIENTS = [
    BadCall("ClientService/ListClients", client_pb2.ListClientsRequest(), _PAGE),
    BadCall(
        "ClientService/SetClientDraining",
        client_pb2.SetClientDrainingRequest(client_id="pc-1"),
        bad_text("client_id", 128, required=True),
    ),
    BadCall(
        "ClientService/DeclareInstanceDead",
        client_pb2.DeclareInstanceDeadRequest(act=_ACTING, client_id="pc-1"),
        [*_ACT, *bad_text("client_id", 128, required=True), *bad_number("instance_number", 65536, 2**32 - 1)],
    ),
]
_INSIGHT = [
    BadCall(
        "InsightService/ExplainAllocation",
        insight_pb2.ExplainAllocationRequest(),
        [
            *bad_id("slot_id", required=False),
            *bad_text("target", 128),
            *bad_text("region", 64),
            *bad_text("client_id", 128),
        ],
    ),
    BadCall(
        "InsightService/SimulateAllocation",
        insight_pb2.SimulateAllocationRequest(client=_CLIENT),
        [*bad_client(), *bad_number("max_items", 257, 2**32 - 1), *bad_text("target", 128), *bad_text("region", 64)],
    ),
    BadCall("InsightService/GetTotals", insight_pb2.GetTotalsRequest()),
    BadCall("InsightService/GetDashboard", insight_pb2.GetDashboardRequest(), [*_PAGE, *bad_day("work_date")]),
    BadCall("InsightService/GetClientPerformance", insight_pb2.GetClientPerformanceRequest(), bad_day("work_date")),
    BadCall(
        "InsightService/GetSettingsEffect",
        insight_pb2.GetSettingsEffectRequest(),
        [
            ("settings", [f"s{n}" for n in range(17)]),
            ("settings", [""]),
            ("settings", ["x" * 65]),
            *bad_text("target", 128),
        ],
    ),
    BadCall("InsightService/GetBlockReport", insight_pb2.GetBlockReportRequest()),
    BadCall(
        "InsightService/GetClientActivity",
        insight_pb2.GetClientActivityRequest(client_id="pc-1"),
        bad_text("client_id", 128, required=True),
    ),
    BadCall(
        "InsightService/GetClientActivity",
        insight_pb2.GetClientActivityRequest(client_ip="10.0.0.1"),
        [("client_ip", "nowhere"), ("client_ip", "300.1.1.1")],
    ),
    BadCall(
        "InsightService/ListWeeklyStatistics",
        insight_pb2.ListWeeklyStatisticsRequest(),
        [*_PAGE, *bad_day("week"), *bad_text("client_id", 128)],
    ),
    BadCall(
        "InsightService/ListAllocations",
        insight_pb2.ListAllocationsRequest(),
        [*_PAGE, *bad_day("work_date"), *bad_number("status", 77), *bad_id("slot_id", required=False)],
    ),
]
_ADMIN = [
    BadCall(
        "AdminService/RevokeLeases",
        admin_pb2.RevokeLeasesRequest(act=_ACTING, allocation_keys=[ID]),
        [*_ACT, *bad_ids("allocation_keys", 1000)],
    ),
    BadCall(
        "AdminService/ReleaseByAge",
        admin_pb2.ReleaseByAgeRequest(act=_ACTING, older_than=seconds(1)),
        [
            *_ACT,
            *bad_duration("older_than", 86400, required=True),
            *bad_id("slot_id", required=False),
            *bad_text("client_id", 128),
            *bad_number("at_most", 10_001, 2**32 - 1),
        ],
    ),
    BadCall(
        "AdminService/ReopenQuota",
        admin_pb2.ReopenQuotaRequest(act=_ACTING, slot_id=ID),
        [*_ACT, *bad_id("slot_id"), *bad_day("work_date"), *bad_number("units", 1_000_001, 2**32 - 1)],
    ),
    BadCall(
        "AdminService/ListQuarantinedResults",
        admin_pb2.ListQuarantinedResultsRequest(),
        [*_PAGE, *bad_id("slot_id", required=False)],
    ),
    *(
        BadCall(
            f"AdminService/{method}",
            request(act=_ACTING, allocation_keys=[ID]),
            [*_ACT, *bad_ids("allocation_keys", 256)],
        )
        for method, request in (
            ("AcceptQuarantinedResults", admin_pb2.AcceptQuarantinedResultsRequest),
            ("DiscardQuarantinedResults", admin_pb2.DiscardQuarantinedResultsRequest),
        )
    ),
    BadCall("AdminService/ListAuditEntries", admin_pb2.ListAuditEntriesRequest(), [*_PAGE, *bad_text("action", 64)]),
]
CALLS: list[BadCall] = [*_WORK, *_SLOTS, *_EXITS, *_TARGETS, *_CLIENTS, *_INSIGHT, *_ADMIN]
SPEC_ROWS: list[Fault] = [*_SPEC_ALL, ("spec.external_id", ""), *(("spec.settings", fault) for fault in SETTING_FAULTS)]
