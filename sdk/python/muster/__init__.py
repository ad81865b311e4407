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
    "connect": "client",
    "Client": "client",
    "RetryPolicy": "calls",
    "Worker": "worker",
    "Job": "jobs",
    "Product": "results",
    "ResultDisposition": "results",
    "WorkOutcome": "results",
    "SlotSpec": "slots",
    "PersonaNeed": "slots",
    "ExitSpec": "exits",
    "Policy": "archives",
    "PartitionInterval": "archives",
    "PersonaStatus": "personas",
    "PersonaCriteria": "personas",
    "SessionFilter": "sessions",
    "SessionState": "reports",
    "Bundle": "bundles",
    "ProfileRefused": "profile",
    "MusterError": "errors",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from muster.archives import PartitionInterval as PartitionInterval
    from muster.archives import Policy as Policy
    from muster.bundles import Bundle as Bundle
    from muster.calls import RetryPolicy as RetryPolicy
    from muster.client import Client as Client
    from muster.client import connect as connect
    from muster.errors import MusterError as MusterError
    from muster.exits import ExitSpec as ExitSpec
    from muster.jobs import Job as Job
    from muster.personas import PersonaCriteria as PersonaCriteria
    from muster.personas import PersonaStatus as PersonaStatus
    from muster.profile import ProfileRefused as ProfileRefused
    from muster.reports import SessionState as SessionState
    from muster.results import Product as Product
    from muster.results import ResultDisposition as ResultDisposition
    from muster.results import WorkOutcome as WorkOutcome
    from muster.sessions import SessionFilter as SessionFilter
    from muster.slots import PersonaNeed as PersonaNeed
    from muster.slots import SlotSpec as SlotSpec
    from muster.worker import Worker as Worker


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'muster' has no attribute {name!r}")
    return getattr(import_module(f"muster.{_HOMES[name]}"), name)
