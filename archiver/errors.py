"""What the archiver refuses, and why."""

from services.errors import DomainError


class PolicyNotFound(DomainError):
    """There is no such policy."""

    reason = "POLICY_NOT_FOUND"


class TableUnsuitable(DomainError):
    """The policy's table is missing, not partitioned as it should be, or in a database that is not configured."""

    reason = "TABLE_UNSUITABLE"


class StaleVersion(DomainError):
    """The policy changed since it was read."""

    reason = "STALE_VERSION"


class RunInProgress(DomainError):
    """Another run works on the same table."""

    reason = "RUN_IN_PROGRESS"


class QueryInvalid(DomainError):
    """The SQL cannot be planned or carried out."""

    reason = "QUERY_INVALID"


class QueryTooCostly(DomainError):
    """The query would read, or hold in memory, more than it may."""

    reason = "QUERY_TOO_COSTLY"


class ArchiveCorrupt(DomainError):
    """A cold file is not what its manifest says."""

    reason = "ARCHIVE_CORRUPT"
