"""A worker process: it starts sessions, reports them to either replica, and completes them.

Run as `python -m tests.fault.tracker.worker <settings as JSON>`. In its history:

- `complete`: it is about to send this result. `completed`: it was acknowledged.
- `refused`: a call was refused for good, with the reason.
- `reported`: how many updates were taken, stale and unknown in one call; `failed`: a call had no answer.
- `truth`: the sessions that are live in the end, as they were last reported and acknowledged.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from tests.fault.tracker.history import Journal

_LIVE = 12
_ATTEMPT_SECONDS = 3.0
# Long enough for the database to recover and for a replica to come back, on a busy machine.
_PATIENCE_SECONDS = 90.0
_REST_SECONDS = 0.05
# With these the service says that it will not do it, however often it is asked.
_REFUSALS = frozenset(
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INTERNAL,
    )
)
# Reconnects at once: the default waits up to two minutes after a replica was away for long.
OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


class Refused(Exception):
    """A call was refused for good; the text is the reason."""


@dataclass(slots=True)
class Run:
    """A session as its worker knows it."""

    session_id: str
    started_at: datetime
    sequence: int = 0
    page: int = 0
    state: int = pb.SESSION_STATE_RUNNING

    def update(self) -> pb.ProgressUpdate:
        return pb.ProgressUpdate(
            session_id=self.session_id,
            sequence=self.sequence,
            state=self.state,  # type: ignore[arg-type]
            current_page=self.page,
            products_found=3 * self.page,
            errors_count=self.page // 5,
        )


class FleetWorker:
    """Makes calls to either replica until one is answered.

    Args:
        name: Before the ids of its sessions.
        settings: As given to the process.
        journal: Its history.
    """

    def __init__(self, name: str, settings: dict[str, Any], journal: Journal) -> None:
        self._name = name
        self._journal = journal
        self._chance = random.Random(f"{settings['seed']} {name}")
        self._metadata = (("authorization", f"Bearer {settings['key']}"),)
        self._stubs: list[Any] = [
            session_pb2_grpc.SessionServiceStub(grpc.insecure_channel(address, options=OPTIONS))
            for address in settings["addresses"]
        ]
        self._begun = 0
        self._runs: list[Run] = []

    def work_until(self, end: float) -> None:
        """Works until a moment, in seconds of the epoch, and then says what is true of what is left."""
        while time.time() < end:
            while len(self._runs) < _LIVE:
                self._begun += 1
                run = Run(f"{self._name}-{self._begun}", datetime.now(UTC))
                if self._start(run):
                    self._runs.append(run)
            moved = self._chance.sample(self._runs, self._chance.randint(1, _LIVE))
            for run in moved:
                self._move(run)
            self._report(moved, patient=False)
            if self._chance.random() < 0.3:
                self._complete(self._runs.pop(self._chance.randrange(len(self._runs))))
            time.sleep(_REST_SECONDS)

    def settle(self) -> None:
        """Reports all that is live until it is acknowledged, now that everything runs again."""
        for run in self._runs:
            self._move(run)
        self._report(self._runs, patient=True)
        sessions = [[run.session_id, run.state, run.sequence, run.page] for run in self._runs]
        self._journal.note("truth", sessions=sessions)

    def _move(self, run: Run) -> None:
        run.sequence += 1
        run.page += self._chance.choice((0, 1, 1, 2))
        if self._chance.random() < 0.1:
            run.state = self._chance.choice((2, 2, 3, 4))

    def _start(self, run: Run) -> bool:
        request = pb.StartSessionRequest(session_id=run.session_id, slot_id=f"slot-{self._begun % 5}")
        request.started_at.FromDatetime(run.started_at)
        if run.sequence:
            request.progress.CopyFrom(run.update())
        try:
            self._call("StartSession", request)
        except Refused as refusal:
            self._journal.note("refused", reason=str(refusal), session=run.session_id)
            return False
        return True

    def _report(self, runs: list[Run], *, patient: bool) -> None:
        """Reports; what is unknown where it went is started again there, or wherever the call ends up."""
        request = pb.ReportProgressRequest(updates=[run.update() for run in runs])
        if self._chance.random() < 0.2:
            # The same once more, and an old one: neither is to change anything.
            request.updates.append(request.updates[0])
            request.updates.add(session_id=runs[0].session_id, sequence=1, current_page=0)
        answer = self._call("ReportProgress", request, patient=patient)
        if answer is None:
            return
        verdicts = [list(answer.verdicts).count(verdict) for verdict in (1, 2, 3)]
        self._journal.note("reported", verdicts=verdicts)
        for run, verdict in zip(runs, answer.verdicts, strict=False):
            if verdict == pb.UPDATE_VERDICT_UNKNOWN_SESSION:
                self._start(run)

    def _complete(self, run: Run) -> None:
        # COMPLETED, FAILED or STOPPED.
        state = self._chance.choice((7, 7, 8, 9))
        self._send_result(run, state, run.page)
        fate = self._chance.random()
        if fate < 0.2:
            self._send_result(run, state, run.page)
        elif fate < 0.3:
            self._send_result(run, state, run.page + 1)

    def _send_result(self, run: Run, state: int, pages: int) -> None:
        counts = pages, 3 * pages, pages // 5
        message = f"after {run.sequence} reports"
        result = [run.session_id, state, *counts, message]
        request = pb.CompleteSessionRequest(
            session_id=run.session_id,
            state=state,  # type: ignore[arg-type]
            total_pages=counts[0],
            products_found=counts[1],
            errors_count=counts[2],
            message=message,
        )
        request.started_at.FromDatetime(run.started_at)
        self._journal.note("complete", result=result)
        try:
            self._call("CompleteSession", request)
        except Refused as refusal:
            self._journal.note("refused", reason=str(refusal), result=result)
        else:
            self._journal.note("completed", result=result)

    def _call(self, method: str, request: Any, *, patient: bool = True) -> Any:
        until = time.monotonic() + _PATIENCE_SECONDS
        turn = self._chance.randrange(len(self._stubs))
        while time.monotonic() < until:
            stub = self._stubs[turn % len(self._stubs)]
            try:
                return getattr(stub, method)(request, metadata=self._metadata, timeout=_ATTEMPT_SECONDS)
            except grpc.RpcError as error:
                code, reason = _reason(error)
                if code in _REFUSALS:
                    raise Refused(reason) from None
                self._journal.note("failed", method=method, code=code.name, reason=reason)
            if not patient:
                return None
            turn += 1
            time.sleep(_REST_SECONDS)
        raise TimeoutError(f"{method}: nobody answered within {_PATIENCE_SECONDS:g} s")


def _reason(error: Any) -> tuple[grpc.StatusCode, str]:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else []:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return error.code(), str(info.reason)
    return error.code(), str(error.details())


def main() -> None:
    """Runs a worker."""
    settings = json.loads(sys.argv[1])
    journal = Journal(Path(settings["folder"]), settings["name"])
    worker = FleetWorker(settings["name"], settings, journal)
    worker.work_until(settings["end"])
    # The last fault has healed by then.
    time.sleep(max(0.0, settings["healed"] - time.time()))
    worker.settle()
    journal.close()


if __name__ == "__main__":
    main()
