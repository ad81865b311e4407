"""A watcher process on one replica: it goes on from where it stood whenever its stream breaks.

Run as `python -m tests.fault.tracker.watcher <settings as JSON>`. In its history, `saw`: one answer, with the state,
sequence and page of each session in it. It ends when it is killed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from tests.fault.tracker.history import Journal
from tests.fault.tracker.worker import OPTIONS

_REST_SECONDS = 0.1


class FleetWatcher:
    """Holds what a watcher holds.

    Args:
        settings: As given to the process.
        journal: Its history.
    """

    def __init__(self, settings: dict[str, Any], journal: Journal) -> None:
        self._journal = journal
        self._metadata = (("authorization", f"Bearer {settings['key']}"),)
        self._stub: Any = session_pb2_grpc.WatchServiceStub(grpc.insecure_channel(settings["address"], options=OPTIONS))
        self._packed = settings["packed"]
        self._epoch, self._offset = "", 0
        self._ids: dict[int, str] = {}

    def watch(self) -> None:
        """Watches for ever."""
        while True:
            request = pb.WatchSessionsRequest(epoch=self._epoch, offset=self._offset, packed=self._packed)
            try:
                for answer in self._stub.WatchSessions(request, metadata=self._metadata):
                    self._take(answer)
            except grpc.RpcError as error:
                self._journal.note("broken", code=error.code().name)
            time.sleep(_REST_SECONDS)

    def _take(self, answer: pb.WatchSessionsResponse) -> None:
        if answer.snapshot:
            self._ids.clear()
        self._ids.update((session.number, session.session_id) for session in answer.sessions)
        seen = [
            [session.session_id, session.state, session.sequence, session.current_page] for session in answer.sessions
        ]
        packed = answer.packed
        for number, *values in zip(packed.number, packed.state, packed.sequence, packed.current_page, strict=True):
            seen.append([self._ids[number], *values])
        self._journal.note(
            "saw",
            epoch=answer.epoch,
            offset=answer.offset,
            snapshot=answer.snapshot,
            sessions=seen,
            removed=list(answer.removed),
        )
        self._epoch, self._offset = answer.epoch, answer.offset


def main() -> None:
    """Runs a watcher."""
    settings = json.loads(sys.argv[1])
    FleetWatcher(settings, Journal(Path(settings["folder"]), settings["name"])).watch()


if __name__ == "__main__":
    main()
