"""What workers are told: commands until they are carried out, and lost leases; on an injected clock."""

from __future__ import annotations

from uuid import uuid4

from session_tracker.commands import Command, CommandKind
from session_tracker.sessions import Lease, Registration, State
from tests.support.tracker_memory import Hands, Report, organization
from tests.support.tracker_model import Ear


def test_commands_are_numbered_upwards_and_the_newest_stands() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s"))
    tracker.command(session, CommandKind.PAUSE, "")
    tracker.command(session, CommandKind.RESUME, "")
    (resume,) = tracker.report([Report(sequence=1)]).commands
    assert resume.kind == CommandKind.RESUME
    assert tracker.report([Report(sequence=2, acknowledged_command=resume.number)]).commands == []
    tracker.command(session, CommandKind.STOP, "")
    assert session.command is not None
    assert session.command.number > resume.number
    after = organization(hands)
    again = Report(sequence=3, acknowledged_command=session.command.number + 10**9)
    restarted = after.start(Registration("s", progress=again))
    after.command(restarted, CommandKind.PAUSE, "")
    assert [command.kind for command in after.report([Report(sequence=4)]).commands] == [CommandKind.PAUSE], (
        "above what the worker carried out before the restart"
    )


def test_leases_are_due_once_a_round_and_a_lost_one_is_told_until_the_end() -> None:
    hands = Hands()
    tracker = organization(hands)
    stream = Ear()
    session = tracker.start(Registration("s", lease=Lease(str(uuid4()), b"t" * 16)))
    tracker.start(Registration("without"))
    assert tracker.live.moved == []
    tracker.report([Report(sequence=1), Report("without", sequence=1)], stream)
    tracker.report([Report(sequence=2)], stream)
    tracker.settle()
    assert tracker.live.moved == [session]
    tracker.lose_lease(session, "LEASE_LOST: expired")
    assert stream.heard == [Command("s", CommandKind.LEASE_LOST, "LEASE_LOST: expired")]
    assert tracker.report([Report(sequence=3), Report(sequence=4)]).commands == stream.heard
    assert tracker.report([Report(sequence=4)]).commands == stream.heard, "also with a stale report"
    assert (session.state, session.reason) == (State.LOST, "lease lost: LEASE_LOST: expired")
    tracker.report([Report(sequence=5, state=State.PAUSED, current_page=3)])
    assert (session.state, session.current_page) == (State.LOST, 3), "reported on, and lost all the same"
    assert not tracker.command(session, CommandKind.RESUME, ""), "nothing replaces a lost lease"
    assert tracker.live.moved == [session], "nor is it renewed"
    tracker.start(Registration("s", lease=Lease(str(uuid4()), b"u" * 16), progress=Report(sequence=6)))
    assert session.state == State.RUNNING, "another lease brings it back"
    assert not tracker.report([Report(sequence=7)]).commands
    assert tracker.live.moved == [session, session]


def test_a_stalled_session_does_not_renew_its_lease() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s", lease=Lease(str(uuid4()), b"t" * 16)))
    tracker.report([Report(sequence=1)])
    tracker.settle()
    tracker.live.moved.clear()
    session.renewable = True
    hands.seconds += 31
    tracker.mark_silence(session)
    assert session.state == State.STALLED
    tracker.report([Report(sequence=2)])
    tracker.settle()
    assert tracker.live.moved == []
    tracker.report([Report(sequence=3, current_page=1)])
    tracker.settle()
    assert tracker.live.moved == [session]
