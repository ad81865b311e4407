"""What the history says of each unit and slot, and the tables to compare it with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.fault.allocator.history import Attempt, End

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class ExitFacts:
    """A pooled exit: `mode` as in the contract (1 until_toggle, 2 concurrent, 3 per_window)."""

    mode: int
    cap: int
    window_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """An allocation as stored; `status` as in the database, 1 for a lease that lives."""

    slot: str
    exit: str
    token: str
    work_date: str
    status: int
    late: bool
    quarantined: bool
    allocated_at: float


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A result as stored."""

    key: str
    outcome: int
    late: bool
    products: int


@dataclass(slots=True)
class Tables:
    """What the database holds when all is quiet.

    Attributes:
        allocations: By key.
        results: All of them.
        quarantined: Their keys.
        requests: The keys that each request id of AllocateWork was answered with.
        broken: Rows that break an invariant, by its name.
    """

    allocations: dict[str, Row] = field(default_factory=dict)
    results: list[ResultRow] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)
    requests: dict[str, set[str]] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Unit:
    """A unit that was acknowledged, and when it certainly was what.

    Attributes:
        begun_at: It was not granted before.
        told_at: It was granted by then.
        live_until: Until then its lease certainly lived: nobody had asked to end it, and it had not run out.
        runs_out_at: As last told to its holder.
        given_back_from: From then on it may have been given back unworked.
        recorded_at: Its result was acknowledged as in time by then; from its grant on it counts for ever.
        late_at: Its result was acknowledged as late by then; from then on it counts for ever.
    """

    key: str
    token: str
    slot: str
    exit: str
    target: str
    work_date: str
    holder: tuple[str, int]
    request_id: str
    begun_at: float
    told_at: float
    runs_out_at: float
    live_until: float = FOREVER
    given_back_from: float = FOREVER
    recorded_at: float = FOREVER
    late_at: float = FOREVER

    def taken(self) -> list[tuple[float, float]]:
        """Returns when it certainly counted against its day's quota."""
        if self.recorded_at < FOREVER:
            return [(self.told_at, FOREVER)]
        spans = [(self.told_at, min(self.given_back_from, self.runs_out_at))]
        if self.late_at < FOREVER:
            spans.append((max(self.late_at, spans[0][1]), FOREVER))
        return spans

    def in_use(self, mode: int) -> tuple[float, float]:
        """Returns when it certainly counted against its exit's cap, had no toggle come."""
        if mode == 2:
            return self.told_at, min(self.live_until, self.runs_out_at)
        if self.recorded_at < FOREVER:
            return self.told_at, FOREVER
        return self.told_at, min(self.given_back_from, self.runs_out_at)


@dataclass(slots=True)
class Toggle:
    """A toggle took effect once between these moments; if nobody was told of it, then maybe never."""

    begun_at: float
    ended_at: float


@dataclass(slots=True)
class SteadySlot:
    """A slot without exit that nobody changed, certainly there from `from_at` on."""

    quota: int
    target: str
    from_at: float


@dataclass(slots=True)
class Evidence:
    """The history, sorted."""

    attempts: list[Attempt]
    units: dict[str, Unit] = field(default_factory=dict)
    toggles: dict[str, list[Toggle]] = field(default_factory=dict)
    # The moments from which on a slot may have had a quota, with the quota.
    quotas: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    steady: dict[str, SteadySlot] = field(default_factory=dict)
    # When the release of a unit was acknowledged to its holder.
    released_at: dict[str, float] = field(default_factory=dict)
    # When a goodbye of its holder was acknowledged, which releases what still lives.
    left_at: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, attempts: Sequence[Attempt]) -> Evidence:
        """Sorts a history."""
        evidence = cls(sorted(attempts, key=lambda attempt: attempt.begun_at))
        evidence._grants()
        for attempt in evidence.attempts:
            match attempt.kind:
                case "renew":
                    evidence._renewed(attempt)
                case "release" | "submit":
                    evidence._ended(attempt)
                case "goodbye":
                    evidence._goodbye(attempt)
        evidence._operators()
        return evidence

    def of_kind(self, *kinds: str) -> Iterable[Attempt]:
        """Yields the attempts of some kinds."""
        return (attempt for attempt in self.attempts if attempt.kind in kinds)

    def _grants(self) -> None:
        begun: dict[str, float] = {}
        for attempt in self.of_kind("allocate"):
            asked = attempt.asked
            begun.setdefault(asked["request_id"], attempt.begun_at)
            for unit in attempt.told.get("units", ()):
                self.units.setdefault(
                    unit["key"],
                    Unit(
                        **{name: unit[name] for name in ("key", "token", "slot", "exit", "target", "work_date")},
                        holder=(asked["client"], asked["instance"]),
                        request_id=asked["request_id"],
                        begun_at=begun[asked["request_id"]],
                        told_at=attempt.ended_at,
                        runs_out_at=unit["expires_at"],
                    ),
                )

    def _renewed(self, attempt: Attempt) -> None:
        for key, error in zip(attempt.asked["keys"], attempt.told.get("errors", ()), strict=False):
            if not error:
                # It lived when it was renewed, so it never ran out in between.
                self.units[key].runs_out_at = max(self.units[key].runs_out_at, attempt.told["expires_at"])

    def _ended(self, attempt: Attempt) -> None:
        for number, key in enumerate(attempt.asked["keys"]):
            unit = self.units[key]
            unit.live_until = min(unit.live_until, attempt.begun_at)
            if attempt.kind == "release":
                unit.given_back_from = min(unit.given_back_from, attempt.begun_at)
                if attempt.end is End.OK and not attempt.told["errors"][number]:
                    self.released_at.setdefault(key, attempt.ended_at)
            elif attempt.told.get("disposition") == "RECORDED":
                unit.recorded_at = min(unit.recorded_at, attempt.ended_at)
            elif attempt.told.get("disposition") == "RECORDED_LATE":
                unit.late_at = min(unit.late_at, attempt.ended_at)

    def _goodbye(self, attempt: Attempt) -> None:
        holder = attempt.asked["client"], attempt.asked["instance"]
        for unit in self.units.values():
            if unit.holder == holder:
                unit.live_until = min(unit.live_until, attempt.begun_at)
                unit.given_back_from = min(unit.given_back_from, attempt.begun_at)
                if attempt.end is End.OK and unit.told_at < attempt.begun_at:
                    self.left_at.setdefault(unit.key, attempt.ended_at)

    def _operators(self) -> None:
        toggles: dict[tuple[str, str], Toggle] = {}
        for attempt in self.of_kind("toggle"):
            exit_id, request_id = attempt.asked["exit"], attempt.asked["request_id"]
            if attempt.end is End.FAIL:
                continue
            toggle = toggles.get((exit_id, request_id))
            if toggle is None:
                toggle = toggles[exit_id, request_id] = Toggle(attempt.begun_at, FOREVER)
                self.toggles.setdefault(exit_id, []).append(toggle)
            # Its request id lets it happen only once: not after the first acknowledgement.
            toggle.ended_at = min(toggle.ended_at, attempt.ended_at)
        for attempt in self.of_kind("resize"):
            self.quotas.setdefault(attempt.asked["slot"], []).append((attempt.begun_at, attempt.asked["quota"]))
        begun: dict[str, float] = {}
        for attempt in self.of_kind("create"):
            asked = attempt.asked
            begun.setdefault(asked["request_id"], attempt.begun_at)
            if (slot := attempt.told.get("slot")) is None:
                continue
            self.quotas.setdefault(slot, []).append((begun[asked["request_id"]], asked["quota"]))
            if asked["steady"] and not asked["with_exit"]:
                self.steady[slot] = SteadySlot(asked["quota"], asked["target"], attempt.ended_at)
