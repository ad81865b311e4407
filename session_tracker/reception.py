"""Takes the batches of one report stream: what is packed like the one before at a glance, all else after its checks."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError
from muster.session_tracker.v1 import session_pb2

from services.validate import Checks
from session_tracker.commands import Listener
from session_tracker.intake import PackedBatch
from session_tracker.messages import command_messages
from session_tracker.metrics import UPDATES
from session_tracker.organizations import STALE, TAKEN, UNKNOWN, Batch, Organization
from session_tracker.packed_bytes import cut
from session_tracker.report_checks import check_batch

_TAKEN = UPDATES.labels("taken")
_STALE = UPDATES.labels("stale")
_UNKNOWN = UPDATES.labels("unknown")


class Reception:
    """Where one stream's batches are taken.

    Args:
        organization: Whose sessions the stream reports.
    """

    def __init__(self, organization: Organization) -> None:
        self._organization = organization
        self._handles = organization.handles()

    def take(self, data: bytes, listener: Listener | None) -> session_pb2.ReportStreamResponse:
        """Takes a batch, a `ReportStreamRequest` in bytes, and returns its answer.

        Args:
            data: The batch.
            listener: Is told the commands for the sessions of the batch from now on.

        Raises:
            InvalidField: it is malformed; nothing of it was taken.
        """
        packed = cut(data)
        if packed is not None and packed.handle in self._handles.convoys:
            taken = self._organization.intake.report_convoy(self._handles, packed)
            if taken is not None:
                _TAKEN.inc(taken.taken)
                return session_pb2.ReportStreamResponse(
                    batch=packed.batch, taken=taken.taken, commands=command_messages(taken.commands)
                )
        request = _parse(data)
        arrays = check_batch(request, self._handles)
        if request.names:
            self._handles.add(request.names)
        response = session_pb2.ReportStreamResponse(batch=request.batch)
        if request.updates:
            self._take_updates(request.updates, listener, response)
        if arrays is not None:
            taken = self._organization.intake.report_packed(
                self._handles,
                arrays.handle,
                arrays.sequence,
                arrays.current_page,
                arrays.total_pages,
                arrays.products_found,
                arrays.errors_count,
                arrays.state,
                listener,
            )
            _answer(taken, response)
            if packed is not None and taken.plain:
                self._handles.gather(arrays.handle, packed)
        return response

    def _take_updates(
        self,
        updates: Sequence[session_pb2.ProgressUpdate],
        listener: Listener | None,
        response: session_pb2.ReportStreamResponse,
    ) -> None:
        batch = self._organization.report(updates, listener)
        response.taken, response.stale, unknown = count(batch)
        if unknown:
            told = zip(updates, batch.verdicts, strict=True)
            names = {update.session_id: None for update, verdict in told if verdict == UNKNOWN}
            response.unknown_sessions.extend(names)
        if batch.commands:
            response.commands.extend(command_messages(batch.commands))

    def close(self) -> None:
        """Applies what waits, since the stream ends."""
        self._handles.close()


def _parse(data: bytes) -> session_pb2.ReportStreamRequest:
    try:
        return session_pb2.ReportStreamRequest.FromString(data)
    except DecodeError:
        checks = Checks()
        checks.fail("batch", "the message cannot be read as a ReportStreamRequest")
        checks.done()
        raise


def _answer(taken: PackedBatch, response: session_pb2.ReportStreamResponse) -> None:
    """Adds what was done with packed updates to an answer."""
    _TAKEN.inc(taken.taken)
    response.taken += taken.taken
    if taken.stale:
        _STALE.inc(taken.stale)
        response.stale += taken.stale
    if taken.unknown:
        _UNKNOWN.inc(len(taken.unknown))
        named = set(response.unknown_sessions)
        response.unknown_sessions.extend(name for name in taken.unknown if name not in named)
    if taken.commands:
        told = {command.session_id for command in response.commands}
        response.commands.extend(
            command_messages(command for command in taken.commands if command.session_id not in told)
        )


def count(batch: Batch) -> tuple[int, int, int]:
    """Returns how many updates were taken, stale and unknown, and adds them to the metrics."""
    verdicts = batch.verdicts
    taken = verdicts.count(TAKEN)
    if taken:
        _TAKEN.inc(taken)
    if taken == len(verdicts):
        return taken, 0, 0
    stale, unknown = verdicts.count(STALE), verdicts.count(UNKNOWN)
    _STALE.inc(stale)
    _UNKNOWN.inc(unknown)
    return taken, stale, unknown
