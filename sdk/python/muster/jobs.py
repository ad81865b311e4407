"""A job: one unit of work in a worker's hands, from its package to its result."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from muster import bundles
from muster.bundles import Bundle
from muster.client import Client
from muster.errors import CheckOutLost, DeadlineExceeded, GenerationNotFound, LeaseLost, MusterError, Unavailable
from muster.following import LiveSession
from muster.leases import HeldLease, LeaseKeeper
from muster.personas import Generation
from muster.profile import pack
from muster.progress import Reporter
from muster.reports import SessionState
from muster.results import ExitSignal, Product, ResultDisposition, SubmittedResult, WorkOutcome, WorkResult
from muster.sessions import CheckpointPolicy, SessionStart
from muster.values import Setting, plain
from muster.work import AssignedExit, AssignedPersona, ClientIdentity

_log = logging.getLogger("muster.worker")

# A worker whose result does not get through has nothing better to do than to keep trying: while the allocator is away
# there is no new work, and a result is recorded however late it comes.
_SUBMIT_SECONDS = 300.0
_RELEASE_SECONDS = 5.0
_LONGEST = timedelta(hours=24)
_LONGEST_DELAY = timedelta(hours=1)
_STATES = {
    WorkOutcome.SUCCEEDED: SessionState.COMPLETED,
    WorkOutcome.FAILED: SessionState.FAILED,
    WorkOutcome.BLOCKED: SessionState.FAILED,
}


class Job:
    """One unit of work; `muster.Worker.jobs` hands it out. Use it as an async context manager around the work.

    Leaving the body without a result gives the unit back. An exception in the body records it as failed, is logged, and
    does not end the worker's loop; a cancellation gives the unit back and goes on.

    Attributes:
        lease_lost: Set when the lease is known to be lost: stop, and do not save. A result handed in all the same is
            recorded late, or kept for an operator.
        applied_settings: What was really applied, for the effect report; the job's settings unless you assign others.
        persona_used: Whether the persona was really used, which moves its counters; set when its bundle is loaded or
            saved.
        session: Its live session: errors by class, and what operators tell it; `await job.session.permit()` before each
            page waits out a pause and keeps to a speed limit.
        exit_signal: What the run says of its exit; assign it before the result, such as RATE_LIMITED for a 429.
        crawl_delay: The delay between requests that the target asks for (robots.txt); assign it before the result.
    """

    def __init__(
        self,
        held: HeldLease,
        identity: ClientIdentity,
        client: Client,
        keeper: LeaseKeeper,
        reporter: Reporter,
        checkpoint: CheckpointPolicy | None = None,
    ) -> None:
        self._held = held
        self._allocation = held.allocation
        self._identity = identity
        self._client = client
        self._keeper = keeper
        self._began = asyncio.get_running_loop().time()
        self._started_at = datetime.now(UTC)
        self._undelivered = False
        self._settled = False
        self.lease_lost = held.lost
        self.applied_settings: Mapping[str, Setting] = self.settings
        self.persona_used = False
        self.exit_signal = ExitSignal.UNSPECIFIED
        self.crawl_delay: timedelta | None = None
        keeper.hold(held)
        self.session = LiveSession(reporter, self._session(checkpoint), held.lost)
        self.session.begin()

    @property
    def key(self) -> str:
        """The allocation key, which is also the id of its live session."""
        return self._allocation.allocation_key

    @property
    def keyword(self) -> str:
        """What to work on."""
        return self._allocation.keyword

    @property
    def code(self) -> str:
        """The site's own code; may be empty."""
        return self._allocation.code

    @property
    def target(self) -> str:
        """Where; may be empty."""
        return self._allocation.target

    @property
    def slot_id(self) -> str:
        """The slot it belongs to."""
        return self._allocation.slot_id

    @property
    def work_date(self) -> date:
        """The day it counts on, in the organization's time zone."""
        return self._allocation.work_date

    @property
    def settings(self) -> dict[str, Setting]:
        """The slot's settings when the lease was granted."""
        return self._allocation.settings

    @property
    def exit(self) -> AssignedExit | None:
        """The way to the target; None when the slot uses none."""
        return self._allocation.exit

    @property
    def persona(self) -> AssignedPersona | None:
        """The identity to work as; None when the slot needs none."""
        return self._allocation.persona

    @property
    def traceparent(self) -> str:
        """W3C trace context of this unit."""
        return self._allocation.traceparent

    @property
    def settled(self) -> bool:
        """Whether its result was handed in or it was given back."""
        return self._settled

    def progress(self, page: int, total: int = 0, products: int = 0, errors: int = 0, *, stage: str = "") -> None:
        """Says where the work stands, in absolute numbers. Never waits and never fails; only the latest state is kept.

        Args:
            page: Pages done.
            total: Pages to do; 0 when unknown.
            products: Products found so far.
            errors: Errors met so far.
            stage: What it does now, up to 64 characters; empty keeps it.
        """
        self.session.progress(page, total, products, errors, stage=stage)

    async def load_bundle(self) -> Bundle:
        """Loads the persona's newest bundle; one without parts when nothing was ever saved.

        Raises:
            ValueError: the job has no persona.
            MusterError: it was refused, or did not succeed in time.
        """
        persona = self._needed_persona()
        self.persona_used = True
        try:
            return await self._client.bundles.load(persona.persona_id)
        except GenerationNotFound:
            return Bundle(persona.persona_id, 0, {})

    async def save_bundle(
        self,
        *,
        profile: Path | str | None = None,
        state: Mapping[str, Any] | None = None,
        history: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> Generation:
        """Commits a new generation of the persona's bundle; what is not given is kept from the one before.

        Args:
            profile: A profile folder, packed as `cookies.tar.gz`.
            state: What becomes `state.json`, such as the checkpoint.
            history: What becomes `history.json`.

        Raises:
            ValueError: the job has no persona, or nothing is given.
            ProfileRefused: the folder is too large.
            CheckOutLost: the persona is no longer this job's; nothing is saved, and `lease_lost` is set.
            MusterError: it was refused, or did not succeed in time.
        """
        persona = self._needed_persona()
        parts = {}
        if profile is not None:
            parts[bundles.COOKIES] = await asyncio.to_thread(pack, Path(profile))
        if state is not None:
            parts[bundles.STATE] = bundles.json_part(state)
        if history is not None:
            parts[bundles.HISTORY] = bundles.json_part(history)
        if not parts:
            raise ValueError("nothing to save: give profile, state or history")
        self.persona_used = True
        try:
            return await self._client.bundles.save(persona.persona_id, persona.lease_token, parts)
        except CheckOutLost:
            self.lease_lost.set()
            raise

    async def succeed(self, *, products: Sequence[Product] = (), exit_ip: str = "") -> ResultDisposition:
        """Hands in that the work was done, and tells what was done with the result.

        Args:
            products: What was found, up to 1000.
            exit_ip: The address the target saw, if known.

        Raises:
            MusterError: it was refused, or did not get through in five minutes.
        """
        return await self._submit(WorkOutcome.SUCCEEDED, products, exit_ip)

    async def fail(self, message: str, *, products: Sequence[Product] = (), exit_ip: str = "") -> ResultDisposition:
        """Hands in that the work could not be done, for a reason of the worker's or the network's.

        Args:
            message: Why; cut at 1024 characters.
            products: What was found all the same.
            exit_ip: The address the target saw, if known.

        Raises:
            MusterError: it was refused, or did not get through in five minutes.
        """
        return await self._submit(WorkOutcome.FAILED, products, exit_ip, message=message)

    async def blocked(
        self,
        block_type: str,
        *,
        retry_after: timedelta | None = None,
        message: str = "",
        products: Sequence[Product] = (),
        exit_ip: str = "",
    ) -> ResultDisposition:
        """Hands in that the target refused: a captcha, a ban, 403 or 429.

        Args:
            block_type: What kind of block, 1 to 64 characters, such as `http_429`.
            retry_after: How long the target asked to be left alone; None when it did not say.
            message: In words; cut at 1024 characters.
            products: What was found before.
            exit_ip: The address the target saw, if known.

        Raises:
            MusterError: it was refused, or did not get through in five minutes.
        """
        wait = min(retry_after, _LONGEST) if retry_after is not None else None
        return await self._submit(
            WorkOutcome.BLOCKED, products, exit_ip, block_type=block_type, retry_after=wait, message=message
        )

    async def release(self, reason: str = "") -> None:
        """Gives the unit back unworked, unless it is settled; another worker gets it. Never fails.

        Args:
            reason: For the log; cut at 256 characters.
        """
        self._keeper.drop(self._held)
        if self._settled or self._undelivered:
            return
        self._settled = True
        self._end(SessionState.STOPPED, reason)
        try:
            answers = await self._client.work.release(
                [self._allocation.lease], reason=plain(reason, 256), total_seconds=_RELEASE_SECONDS
            )
        except MusterError as error:
            _log.warning("%s is not given back and will expire: %s", self.key, error)
            return
        if answers[0].error is not None:
            _log.info("%s is not given back: %s", self.key, answers[0].error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            _log.error("%s (%s) failed", self.key, self.keyword, exc_info=error)
            if not self._settled and not self._undelivered:
                try:
                    await self.fail(f"{type(error).__name__}: {error}")
                except MusterError as refused:
                    _log.error("%s: the failure is not recorded: %s", self.key, refused)
            return True
        await self.release("the work was cancelled" if error is not None else "the worker left it without a result")
        return False

    async def _submit(
        self,
        outcome: WorkOutcome,
        products: Sequence[Product],
        exit_ip: str,
        *,
        block_type: str = "",
        retry_after: timedelta | None = None,
        message: str = "",
    ) -> ResultDisposition:
        if self._settled:
            raise RuntimeError(f"{self.key} has its result already")
        result = WorkResult(
            lease=self._allocation.lease,
            outcome=outcome,
            execution_time=min(timedelta(seconds=asyncio.get_running_loop().time() - self._began), _LONGEST),
            block_type=block_type,
            products=products,
            applied_settings=self.applied_settings,
            exit_ip=exit_ip,
            retry_after=retry_after,
            error_message=plain(message, 1024),
            persona_used=self.persona_used,
            exit_signal=self.exit_signal,
            crawl_delay=min(self.crawl_delay, _LONGEST_DELAY) if self.crawl_delay is not None else None,
        )
        try:
            answers = await self._client.work.submit(self._identity, [result], total_seconds=_SUBMIT_SECONDS)
        except (Unavailable, DeadlineExceeded):
            # It may have been recorded: to hand in another outcome now could turn a success into a failure.
            self._undelivered = True
            raise
        answer: SubmittedResult = answers[0]
        if answer.error is not None:
            if isinstance(answer.error, LeaseLost):
                self.lease_lost.set()
                self._settled = True
                self._end(SessionState.STOPPED, str(answer.error))
            raise answer.error
        self._settled = True
        self._end(_STATES[outcome], message or block_type)
        if answer.disposition is not ResultDisposition.RECORDED:
            _log.warning("the result of %s came late: %s", self.key, answer.disposition.name.lower())
        return answer.disposition

    def _session(self, checkpoint: CheckpointPolicy | None) -> SessionStart:
        snapshot = json.dumps(self.settings, ensure_ascii=False)
        # Settings have at most 16 KiB, and JSON of them somewhat more than the 16 KiB that a snapshot may have.
        return SessionStart(
            session_id=self.key,
            started_at=self._started_at,
            slot_id=self.slot_id,
            client_id=self._identity.client_id,
            config_snapshot_json=snapshot if len(snapshot.encode()) <= 16 * 2**10 else "",
            allocation_key=self.key,
            lease_token=self._allocation.lease.lease_token,
            checkpoint=checkpoint,
            traceparent=self.traceparent,
        )

    def _end(self, state: SessionState, message: str) -> None:
        self._keeper.drop(self._held)
        self.session.end(state, message)

    def _needed_persona(self) -> AssignedPersona:
        if self.persona is None:
            raise ValueError(f"{self.key} has no persona: its slot does not ask for one")
        return self.persona
