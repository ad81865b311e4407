"""The client of the Muster control plane: a typed async client and the worker loop.

    async with muster.connect() as client, muster.Worker(client, client_id="pc-17") as worker:
        async for job in worker.jobs():
            async with job:
                await job.succeed(products=await crawl(job.keyword))

Names are looked up when they are first used: the services import the generated stubs below this package, and need
nothing else of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "client": (
        "connect",
        "Client",
    ),
    "calls": ("RetryPolicy",),
    "worker": ("Worker",),
    "jobs": ("Job",),
    "results": (
        "ExitSignal",
        "Lease",
        "Product",
        "ResultDisposition",
        "SubmittedResult",
        "WorkOutcome",
        "WorkResult",
    ),
    "work": (
        "Allocation",
        "AssignedExit",
        "AssignedPersona",
        "BlockerKind",
        "ClientIdentity",
    ),
    "slot_specs": (
        "SlotSpec",
        "PersonaNeed",
        "Pacing",
    ),
    "slots": ("Slot",),
    "exits": (
        "ExitCapMode",
        "ExitSpec",
        "Exit",
    ),
    "targets": ("TargetPolicy",),
    "insight": ("AllocationStatus",),
    "personas": (
        "Persona",
        "PersonaCriteria",
        "PersonaStatus",
        "UseOutcome",
    ),
    "bundles": ("Bundle",),
    "profile": ("ProfileRefused",),
    "reports": (
        "CommandKind",
        "ErrorEntry",
        "ProgressUpdate",
        "SessionState",
    ),
    "following": ("LiveSession",),
    "blocking": ("follow",),
    "session_views": (
        "Session",
        "SessionFilter",
    ),
    "sessions": (
        "CheckpointPolicy",
        "SessionEnd",
        "SessionStart",
    ),
    "archives": (
        "ArchiveStep",
        "PartitionInterval",
        "Policy",
    ),
    "errors": (
        "FieldViolation",
        "MusterError",
        "NotConfigured",
        "InvalidArgument",
        "InvalidField",
        "InvalidPageToken",
        "PartTooLarge",
        "QueryInvalid",
        "Unauthenticated",
        "PermissionDenied",
        "DeadlineExceeded",
        "Unavailable",
        "ResourceExhausted",
        "Overloaded",
        "LimitReached",
        "QueryTooCostly",
        "ServiceFault",
        "Unimplemented",
        "NotFound",
        "NoPersonaMatches",
        "GenerationNotFound",
        "SessionNotFound",
        "AlreadyExists",
        "RequestIdReused",
        "SlotExists",
        "FingerprintExists",
        "SessionAlreadyCompleted",
        "FailedPrecondition",
        "LeaseLost",
        "LeaseAgeExceeded",
        "CheckOutLost",
        "CheckOutReadOnly",
        "PersonaCheckedOut",
        "StatusTransitionRefused",
        "TableUnsuitable",
        "Aborted",
        "StaleVersion",
        "RunInProgress",
        "DataLoss",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from muster.archives import ArchiveStep as ArchiveStep
    from muster.archives import PartitionInterval as PartitionInterval
    from muster.archives import Policy as Policy
    from muster.blocking import follow as follow
    from muster.bundles import Bundle as Bundle
    from muster.calls import RetryPolicy as RetryPolicy
    from muster.client import Client as Client
    from muster.client import connect as connect
    from muster.errors import Aborted as Aborted
    from muster.errors import AlreadyExists as AlreadyExists
    from muster.errors import CheckOutLost as CheckOutLost
    from muster.errors import CheckOutReadOnly as CheckOutReadOnly
    from muster.errors import DataLoss as DataLoss
    from muster.errors import DeadlineExceeded as DeadlineExceeded
    from muster.errors import FailedPrecondition as FailedPrecondition
    from muster.errors import FieldViolation as FieldViolation
    from muster.errors import FingerprintExists as FingerprintExists
    from muster.errors import GenerationNotFound as GenerationNotFound
    from muster.errors import InvalidArgument as InvalidArgument
    from muster.errors import InvalidField as InvalidField
    from muster.errors import InvalidPageToken as InvalidPageToken
    from muster.errors import LeaseAgeExceeded as LeaseAgeExceeded
    from muster.errors import LeaseLost as LeaseLost
    from muster.errors import LimitReached as LimitReached
    from muster.errors import MusterError as MusterError
    from muster.errors import NoPersonaMatches as NoPersonaMatches
    from muster.errors import NotConfigured as NotConfigured
    from muster.errors import NotFound as NotFound
    from muster.errors import Overloaded as Overloaded
    from muster.errors import PartTooLarge as PartTooLarge
    from muster.errors import PermissionDenied as PermissionDenied
    from muster.errors import PersonaCheckedOut as PersonaCheckedOut
    from muster.errors import QueryInvalid as QueryInvalid
    from muster.errors import QueryTooCostly as QueryTooCostly
    from muster.errors import RequestIdReused as RequestIdReused
    from muster.errors import ResourceExhausted as ResourceExhausted
    from muster.errors import RunInProgress as RunInProgress
    from muster.errors import ServiceFault as ServiceFault
    from muster.errors import SessionAlreadyCompleted as SessionAlreadyCompleted
    from muster.errors import SessionNotFound as SessionNotFound
    from muster.errors import SlotExists as SlotExists
    from muster.errors import StaleVersion as StaleVersion
    from muster.errors import StatusTransitionRefused as StatusTransitionRefused
    from muster.errors import TableUnsuitable as TableUnsuitable
    from muster.errors import Unauthenticated as Unauthenticated
    from muster.errors import Unavailable as Unavailable
    from muster.errors import Unimplemented as Unimplemented
    from muster.exits import Exit as Exit
    from muster.exits import ExitCapMode as ExitCapMode
    from muster.exits import ExitSpec as ExitSpec
    from muster.following import LiveSession as LiveSession
    from muster.insight import AllocationStatus as AllocationStatus
    from muster.jobs import Job as Job
    from muster.personas import Persona as Persona
    from muster.personas import PersonaCriteria as PersonaCriteria
    from muster.personas import PersonaStatus as PersonaStatus
    from muster.personas import UseOutcome as UseOutcome
    from muster.profile import ProfileRefused as ProfileRefused
    from muster.reports import CommandKind as CommandKind
    from muster.reports import ErrorEntry as ErrorEntry
    from muster.reports import ProgressUpdate as ProgressUpdate
    from muster.reports import SessionState as SessionState
    from muster.results import ExitSignal as ExitSignal
    from muster.results import Lease as Lease
    from muster.results import Product as Product
    from muster.results import ResultDisposition as ResultDisposition
    from muster.results import SubmittedResult as SubmittedResult
    from muster.results import WorkOutcome as WorkOutcome
    from muster.results import WorkResult as WorkResult
    from muster.session_views import Session as Session
    from muster.session_views import SessionFilter as SessionFilter
    from muster.sessions import CheckpointPolicy as CheckpointPolicy
    from muster.sessions import SessionEnd as SessionEnd
    from muster.sessions import SessionStart as SessionStart
    from muster.slot_specs import Pacing as Pacing
    from muster.slot_specs import PersonaNeed as PersonaNeed
    from muster.slot_specs import SlotSpec as SlotSpec
    from muster.slots import Slot as Slot
    from muster.targets import TargetPolicy as TargetPolicy
    from muster.work import Allocation as Allocation
    from muster.work import AssignedExit as AssignedExit
    from muster.work import AssignedPersona as AssignedPersona
    from muster.work import BlockerKind as BlockerKind
    from muster.work import ClientIdentity as ClientIdentity
    from muster.worker import Worker as Worker


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'muster' has no attribute {name!r}")
    return getattr(import_module(f"muster.{_HOME[name]}"), name)
