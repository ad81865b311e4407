"""The operators' commands against a real allocator."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from muster.allocator.v1 import work_pb2

from services.call import Role
from tests.support.allocator import Allocator, result
from tests.support.command import Muster
from tests.support.services import StartService

PROVIDER = {"url": "http://127.0.0.1:9/exits", "holder": "test"}
DATES = ("--start-date", "2020-01-01", "--end-date", "2099-12-31", "--daily-quota", "9")


@dataclass(frozen=True, slots=True)
class Desk:
    """An operator's desk: the command with an administrator's key, and the allocator behind it."""

    muster: Muster
    allocator: Allocator

    async def said(self, *arguments: str) -> str:
        """Runs a command that must end well; returns what it printed."""
        ended = await self.muster(*arguments)
        assert ended.code == 0, ended.err
        return ended.out

    async def read(self, *arguments: str) -> Any:
        """Runs a command that must end well; returns its JSON."""
        return (await self.muster(*arguments, "--json")).json()


@pytest.fixture
async def desk(start_service: StartService, tmp_path: Path) -> Desk:
    """One over an allocator with a provider of exits that is not there."""
    service = await start_service(
        "allocator",
        leases={"sweep_seconds": 0.2},
        exit_providers={"vpn": PROVIDER},
        external_exits={"reconcile_seconds": 3600},
    )
    key = await service.key(Role.ADMIN)
    return Desk(Muster(tmp_path, MUSTER_API_KEY=key, MUSTER_ALLOCATOR=service.address), await Allocator.of(service))


async def test_a_slots_life(desk: Desk) -> None:
    options = (
        "--pacing",
        "even",
        "--exit-provider",
        "vpn",
        "--exit-region",
        "kr",
        "--persona-tag",
        "a",
        "--code",
        "c1",
    )
    made = await desk.read("slot", "create", "--keyword", "노트북", *DATES, *options, "--settings", '{"pages": 4}')
    spec = made["spec"]
    assert (spec["pacing"], spec["exit_provider"], spec["exit_region"]) == ("EVEN", "vpn", "kr")
    assert (spec["settings"], spec["persona"]["tags"]) == ({"pages": 4}, ["a"])
    slot_id = made["slot_id"]
    refused = await desk.muster("slot", "update", slot_id, "--exit-provider", "nobody")
    assert (refused.code, "spec.exit_provider: must be a configured provider: vpn" in refused.err) == (1, True)
    await desk.said("slot", "update", slot_id, "--exit-provider", "", "--exit-region", "", "--without-exit")
    # Of the persona, too, what is not named stays.
    rested = await desk.read("slot", "update", slot_id, "--persona-rest", "60", "--persona-region", "kr")
    need = {"tags": ["a"], "region": "kr", "min_aging_level": 0, "cool_down_seconds": 60}
    assert rested["spec"]["persona"] == need
    assert (await desk.read("slot", "update", slot_id, "--needs-persona"))["spec"]["persona"] == need
    any_tag = await desk.read("slot", "update", slot_id, "--persona-tag", "")
    assert any_tag["spec"]["persona"] == {**need, "tags": []}
    stale = await desk.muster("slot", "update", slot_id, "--persona-rest", "9", "--etag", made["etag"])
    assert (stale.code, "STALE_VERSION" in stale.err) == (1, True)
    await desk.said("slot", "update", slot_id, "--needs-no-persona", "--weight", "3", "--reason", "heavier")
    assert await desk.said("slot", "pause", slot_id, "--reason", "holiday") == "paused\n"
    assert [slot["slot_id"] for slot in await desk.read("slot", "list", "--inactive", "--code", "c1")] == [slot_id]
    assert await desk.read("slot", "list", "--active") == []
    assert await desk.said("slot", "resume", slot_id) == "resumed\n"
    changes = await desk.read("slot", "history", slot_id)
    assert [change["reason"] for change in changes] == ["", "holiday", "heavier", "", "", ""]
    assert changes[1]["difference"] == {"is_active": [True, False]}
    shown = await desk.read("slot", "get", slot_id)
    assert (shown["spec"]["without_exit"], shown["spec"]["persona"], shown["spec"]["weight"]) == (True, None, 3)


async def test_slots_go_out_into_a_file_and_back(desk: Desk) -> None:
    header = (
        "external_id,keyword,start_date,end_date,daily_quota,persona.tags,pacing,is_active,setting.pages:int,setting.on"
    )
    row = "노트북,2020-01-01,2099-12-31,4,a b,even,no,4,true\n"
    (desk.muster.folder / "slots.csv").write_text(f"{header}\ns-1,{row}s-2,{row}", encoding="utf-8")
    assert await desk.said("slot", "import", "slots.csv") == "2 created, 0 stood already, 0 refused, of 2 row(s)\n"
    exported = await desk.said("slot", "export")
    lines = [json.loads(line) for line in exported.splitlines()]
    assert [line["external_id"] for line in lines] == ["s-1", "s-2"]
    assert (lines[0]["settings"], lines[0]["persona"]["tags"], lines[0]["is_active"]) == (
        {"pages": 4, "on": True},
        ["a", "b"],
        False,
    )
    # The same slots, so nothing is made.
    (desk.muster.folder / "slots.jsonl").write_text(exported, encoding="utf-8")
    again = (await desk.muster("slot", "import", "slots.jsonl", "--json")).json_lines()
    assert [(line["row"], line["result"]) for line in again] == [(1, "stands"), (2, "stands")]


async def test_exits_of_every_mode_and_their_health(desk: Desk) -> None:
    rows = "endpoint,cap_mode,cap,window_seconds\nhttp://10.0.0.1:1,per_window,5,60\nhttp://10.0.0.2:1,concurrent,7,\n"
    (desk.muster.folder / "exits.csv").write_text(rows)
    assert await desk.said("exit", "import", "exits.csv") == "2 exit(s) registered\n"
    (added,) = await desk.read("exit", "add", "http://10.0.0.3:1", "--cap-mode", "per-window", "--window", "1h")
    assert (added["spec"]["cap_mode"], added["spec"]["window"], added["spec"]["cap"]) == ("PER_WINDOW", 3600.0, 20)
    listed = {one["spec"]["endpoint"]: one for one in await desk.read("exit", "list")}
    assert [listed[f"http://10.0.0.{n}:1"]["spec"]["cap_mode"] for n in (1, 2)] == ["PER_WINDOW", "CONCURRENT"]
    exit_id = added["exit_id"]
    for other in listed.values():
        if other["exit_id"] != exit_id:
            assert await desk.said("exit", "disable", other["exit_id"]) == "disabled\n"
    await desk.allocator.slot(without_exit=False, target="shop")
    (unit,) = await desk.allocator.take(1)
    await desk.allocator.submit(result(unit, 3, exit_signal=work_pb2.EXIT_SIGNAL_RATE_LIMITED))
    (health,) = await desk.read("exit", "health", "--target", "shop")
    assert (health["exit_id"], health["signal"], health["faults"]) == (exit_id, "RATE_LIMITED", 1)
    assert await desk.said("exit", "clear", exit_id, "--target", "other") == "0 cool-down(s) ended\n"
    assert await desk.said("exit", "clear", exit_id) == "1 cool-down(s) ended\n"
    await desk.said("exit", "toggle", exit_id, "--reason", "new address")
    (toggle,) = await desk.read("exit", "toggles", exit_id)
    assert toggle["reason"] == "new address"
    assert (await desk.read("exit", "forecast"))["capacity"] == 20
    assert "use(s) left" in await desk.said("exit", "forecast")
    (provider,) = await desk.read("exit", "providers")
    assert provider["name"] == "vpn"
    (desk.muster.folder / "exits.csv").write_text("endpoint,cap\nhttp://10.0.0.9:1,many\n")
    wrong = await desk.muster("exit", "import", "exits.csv")
    assert wrong.err == "Error: exits.csv, line 2: cap must be a whole number, is 'many'\n"


async def test_a_target_is_treated_as_its_operator_says(desk: Desk) -> None:
    await desk.allocator.slot(target="shop")
    (state,) = await desk.read("target", "policy", "shop", "--max-in-flight", "3", "--no-auto-pause")
    assert (state["policy"]["max_in_flight"], state["policy"]["auto_pause"]) == (3, False)
    # What is not named stays.
    (state,) = await desk.read("target", "policy", "shop", "--min-delay", "2s")
    assert state["policy"] == {"max_in_flight": 3, "min_delay": 2.0, "auto_pause": False}
    await desk.said("target", "hold", "shop", "--for", "30m", "--reason", "asked by phone")
    (held,) = await desk.read("target", "list", "--stopped")
    assert (held["target"], held["reason"]) == ("shop", "asked by phone")
    explained = await desk.read("explain", "--target", "shop")
    assert explained["blockers"][0]["kind"] == "TARGET_HELD"
    (free,) = await desk.read("target", "resume", "shop")
    assert free["held_until"] is None
    assert await desk.read("target", "list", "--stopped") == []
    unknown = await desk.muster("target", "resume", "nobody")
    assert (unknown.code, "TARGET_NOT_FOUND" in unknown.err) == (1, True)


async def test_clients_are_drained_and_declared_dead(desk: Desk) -> None:
    await desk.allocator.slot()
    await desk.allocator.take(2, client="pc-7")
    (shown,) = await desk.read("client", "list", "--online")
    assert (shown["client_id"], shown["leases"], len(shown["instances"])) == ("pc-7", 2, 1)
    assert "pc-7" in await desk.said("client", "list", "--instances")
    (drained,) = await desk.read("client", "drain", "pc-7")
    assert drained["draining"]
    assert (await desk.allocator.heartbeat("pc-7")).drain
    explained = await desk.read("explain", "--client", "pc-7")
    assert explained["blockers"][0]["kind"] == "CLIENT_DRAINING"
    dead = ("client", "dead", "pc-7", "--reason", "on fire")
    assert await desk.said(*dead, "0", "--dry-run") == "2 lease(s) would be freed\n"
    assert (await desk.allocator.totals()).leased == 2
    once = ("--request-id", str(uuid.uuid4()))
    assert await desk.said(*dead, "0", *once) == "2 lease(s) freed\n"
    await desk.said("client", "undrain", "pc-7")
    await desk.allocator.take(1, client="pc-7")
    assert await desk.said(*dead, "0", *once) == "2 lease(s) freed\n"
    assert len(await desk.allocator.sql("SELECT FROM leases")) == 1
    (back,) = await desk.read("client", "undrain", "pc-7")
    assert not back["draining"]
    unknown = await desk.muster(*dead, "5", "--dry-run")
    assert (unknown.code, "CLIENT_NOT_FOUND" in unknown.err) == (1, True)


async def test_leases_and_quotas_are_acted_on_by_hand_after_a_dry_run(desk: Desk) -> None:
    slot = await desk.allocator.slot(daily_quota=4)
    units = await desk.allocator.take(3)
    act = ("--reason", "stuck")
    key = units[0].allocation_key
    assert (await desk.muster("lease", "revoke", key)).code == 2
    assert await desk.said("lease", "revoke", key, *act, "--dry-run") == "1 would be revoked\n"
    assert (await desk.allocator.totals()).leased == 3
    assert await desk.said("lease", "revoke", key, *act) == "1 revoked\n"
    stranger = str(uuid.uuid4())
    unknown = await desk.muster("lease", "revoke", stranger, *act, "--json")
    assert (unknown.code, json.loads(unknown.out)[0]["allocation_key"]) == (1, stranger)
    assert unknown.err == "Error: 1 of 1 were refused\n"
    tried = await desk.said("lease", "release", "--older-than", "0s", "--at-most", "1", "--dry-run", *act)
    assert tried.splitlines()[-1] == "1 would be released, 1 more match"
    released = await desk.read("lease", "release", "--older-than", "0s", "--slot", slot.slot_id, *act)
    assert sorted(released["example_keys"]) == sorted(unit.allocation_key for unit in units[1:])
    assert (await desk.said("lease", "release", "--older-than", "1h", *act)).endswith("0 released\n")
    tried = await desk.said("quota", "reopen", slot.slot_id, "--units", "5", "--dry-run", *act)
    assert tried.startswith("the quota would be 9, was 4")
    again = ("--request-id", str(uuid.uuid4()))
    for _ in range(2):
        reopened = await desk.read("quota", "reopen", slot.slot_id, "--units", "5", *act, *again)
        assert reopened == {"quota_before": 4, "quota": 9, "room": 9}
    entries = await desk.read("audit")
    assert entries[0]["action"] == "ReopenQuota"
    assert {entry["action"] for entry in entries} == {"ReopenQuota", "ReleaseByAge", "RevokeLeases"}
    assert {entry["reason"] for entry in entries} == {"stuck"}
    (only,) = await desk.read("audit", "--action", "ReopenQuota")
    assert only["resource"]
    operator = Muster(
        desk.muster.folder,
        MUSTER_API_KEY=await desk.allocator.service.key(Role.OPERATOR),
        MUSTER_ALLOCATOR=desk.allocator.service.address,
    )
    refused = await operator("audit")
    assert (refused.code, "ROLE_NOT_ALLOWED" in refused.err) == (1, True)


async def test_results_in_quarantine_are_accepted_or_discarded(desk: Desk) -> None:
    allocator = desk.allocator
    slot = await allocator.slot(daily_quota=3)
    late = await allocator.take(3)
    await allocator.run_out(*late)
    await allocator.swept(*late)
    # Their units are handed out again and done, so that there is no room for the results that come now.
    await allocator.submit(*(result(unit) for unit in await allocator.take(3)))
    await allocator.submit(*(result(unit) for unit in late))
    listed = await desk.read("quarantine", "list", "--slot", slot.slot_id)
    assert {one["allocation_key"] for one in listed} == {unit.allocation_key for unit in late}
    assert listed[0]["outcome"] == "SUCCEEDED"
    assert late[0].allocation_key in await desk.said("quarantine", "list")
    first, second, third = (one["allocation_key"] for one in listed)
    act = ("--reason", "looked at")
    assert await desk.said("quarantine", "accept", first, "--dry-run", *act) == "1 would be accepted\n"
    assert len(await desk.read("quarantine", "list")) == 3
    assert await desk.said("quarantine", "accept", first, second, *act) == "2 accepted\n"
    assert await desk.said("quarantine", "discard", third, *act) == "1 discarded\n"
    assert await desk.read("quarantine", "list") == []
    gone = await desk.muster("quarantine", "discard", third, *act)
    assert (gone.code, "QUARANTINED_RESULT_NOT_FOUND" in gone.err) == (1, True)
    tracking = await allocator.tracking(slot.slot_id)
    assert (tracking["quota"], tracking["succeeded"], tracking["expired"]) == (5, 5, 1)


async def test_reports_and_what_if(desk: Desk) -> None:
    slot = await desk.allocator.slot(daily_quota=20, keyword="json", target="shop")
    units = await desk.allocator.take(12)
    applied = {"pace": work_pb2.SettingValue(double_value=0.5)}
    await desk.allocator.submit(*(result(unit, applied_settings=applied) for unit in units[:11]))
    await desk.allocator.submit(result(units[11], 3))
    reads = {
        name: desk.read("report", *name.split())
        for name in ("totals", "dashboard", "clients", "settings", "settings --setting pace", "blocks", "activity pc-1")
    }
    found = dict(zip(reads, await asyncio.gather(*reads.values()), strict=True))
    assert found["totals"]["today"]["succeeded"] == 11
    (row,) = found["dashboard"]
    assert (row["slot_id"], row["tracking"]["blocked"]) == (slot.slot_id, 1)
    (client,) = found["clients"]
    assert (client["client_id"], client["tasks"], client["mean_execution"]) == ("pc-1", 12, 2.0)
    (effect,) = found["settings --setting pace"]
    assert (effect["results"], effect["succeeded"]) == (11, 11)
    assert effect["rate_low"] < effect["success_rate"] <= effect["rate_high"]
    assert found["blocks"] == [{"block_type": "captcha", "count": 1, "affected_clients": 1}]
    (activity,) = found["activity pc-1"]
    assert activity["reports"] == 12
    assert (await desk.muster("report", "activity")).code == 2
    would = await desk.read("what-if", "pc-1", "--items", "3", "--target", "shop")
    assert [unit["slot_id"] for unit in would["units"]] == [slot.slot_id] * 3
    assert "no work (no_slot)" in await desk.said("what-if", "pc-1", "--target", "other")
    tables = ("totals", "dashboard", "clients", "settings", "blocks")
    shown = await asyncio.gather(*(desk.said("report", name) for name in tables))
    assert all(shown)


async def test_weeks_that_are_over_are_reported(desk: Desk) -> None:
    rows = [("2026-03-02", "", 5), ("2026-03-09", "", 4), ("2026-03-09", "pc-1", 3), ("2026-03-09", "pc-2", 1)]
    for week, client, results in rows:
        await desk.allocator.sql(
            "INSERT INTO weekly_statistics VALUES ($1, $2::text::date, $3, $4::bigint, $4, 0, 0, $4 * 1500, now())",
            await desk.allocator.service.organization_id(),
            week,
            client,
            results,
        )
    listed = await desk.read("report", "weekly")
    assert [(row["week"], row["client_id"], row["results"]) for row in listed] == [*rows[1:], rows[0]]
    assert (listed[0]["succeeded"], listed[0]["execution"]) == (4, 6.0)
    assert [row["results"] for row in await desk.read("report", "weekly", "--limit", "2")] == [4, 3]
    (one,) = await desk.read("report", "weekly", "--week", "2026-03-15", "--client", "pc-2")
    assert (one["week"], one["results"]) == ("2026-03-09", 1)
    shown = await desk.said("report", "weekly", "--week", "2026-03-04")
    assert ("(all)" in shown, "1.5" in shown) == (True, True)
