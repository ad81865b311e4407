"""What selects live sessions."""

from __future__ import annotations

from dataclasses import dataclass

from session_tracker.sessions import Session


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects sessions; what is empty does not bind."""

    states: frozenset[int] = frozenset()
    slot_id: str = ""
    client_id: str = ""
    stage: str = ""
    tag: str = ""

    @property
    def binds(self) -> bool:
        """Whether there is a session it does not select."""
        return bool(self.states or self.slot_id or self.client_id or self.stage or self.tag)

    def matches(self, session: Session) -> bool:
        """Whether all that is set holds."""
        return (
            (not self.states or session.state in self.states)
            and (not self.slot_id or session.slot_id == self.slot_id)
            and (not self.client_id or session.client_id == self.client_id)
            and (not self.stage or session.stage == self.stage)
            and (not self.tag or self.tag in session.tags)
        )
