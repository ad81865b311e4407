"""The HTTP adapter of external exits; docs/exit-provider.openapi.yaml is its contract.

What comes back is not trusted: answers are read up to a bound, taken as they are (no compression, no redirect), and
checked before they are believed. Anything else is a ProviderFault, never another exception.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar
from uuid import UUID

import aiohttp
from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, StringConstraints, ValidationError

from allocator.config import ExitProviderConfig
from allocator.exit_providers import DemandRefused, NoneFree, ProviderFault, RemoteExit
from allocator.exits import is_endpoint
from services.config import read_secret
from services.errors import first_line

PAGE = 1000
# A page of 1,000 keys has some 60 KB.
_ANSWER_BYTES = 256 * 1024
_CONNECTIONS = 64
# By how much the provider's clock may be behind ours.
_SKEW = timedelta(seconds=60)
# Refusals of our token or of this moment, and so of every demand.
_REFUSES_ALL = (401, 408, 429)


def _address(value: str) -> str:
    # An IPv6 address may carry a scope, which may be any text, and names an interface that we do not have.
    if "%" in value:
        raise ValueError("has a scope")
    return str(ipaddress.ip_address(value))


def _endpoint(value: str) -> str:
    if not is_endpoint(value):
        raise ValueError("not scheme://host:port")
    return value


class _ExitAnswer(BaseModel):
    exit_ip: Annotated[str, AfterValidator(_address)]
    endpoint: Annotated[str, StringConstraints(max_length=512), AfterValidator(_endpoint)]
    region: Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")]
    expires_at: AwareDatetime


class _HeldAnswer(BaseModel):
    allocation_key: UUID


class _PageAnswer(BaseModel):
    leases: Annotated[list[_HeldAnswer], Field(max_length=PAGE)]


_Model = TypeVar("_Model", bound=BaseModel)


class HttpExitProvider:
    """Implements `allocator.exit_providers.ExitProvider`. Make it where the event loop runs.

    Every call may be repeated: aiohttp repeats one by itself, once, if its connection is dropped without an answer.

    Raises:
        StartupError: the token cannot be read.
    """

    def __init__(self, config: ExitProviderConfig) -> None:
        self._url = config.url.rstrip("/")
        self._holder = config.holder
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if config.token_file is not None:
            headers["Authorization"] = f"Bearer {read_secret(config.token_file)}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=config.timeout_seconds),
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
            # One tenant's cookie would come along with another's call.
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def take(self, key: UUID, organization_id: UUID, region: str, duration_seconds: float) -> RemoteExit:
        """Takes an exit under a key, or returns the one it has. Raises: ProviderFault, DemandRefused, NoneFree."""
        body = {
            "holder": self._holder,
            "organization": str(organization_id),
            "region": region,
            "duration_seconds": round(duration_seconds),
        }
        status, answer = await self._request("PUT", f"/v1/leases/{key}", json=body)
        if status == 409:
            raise NoneFree
        if 400 <= status < 500 and status not in _REFUSES_ALL:
            raise DemandRefused(f"status {status}")
        found = _parsed(_ExitAnswer, answer) if status in (200, 201) else _refused(status)
        if region and found.region not in ("", region):
            raise ProviderFault(f"the exit is of region {found.region!r}, not {region!r}", lost=False)
        # Counted from the time in the key, a UUIDv7: a repeat of the call gets the exit of the first one.
        asked_at = datetime.fromtimestamp((key.int >> 80) / 1000, UTC)
        if found.expires_at < asked_at + timedelta(seconds=duration_seconds) - _SKEW:
            raise ProviderFault("the exit expires before the duration that was asked for", lost=False)
        return RemoteExit(found.exit_ip, found.endpoint, found.region)

    async def give_back(self, key: UUID) -> None:
        """Gives the exit of a key back. Raises: ProviderFault."""
        status, _ = await self._request("DELETE", f"/v1/leases/{key}")
        if status not in (200, 204, 404):
            _refused(status)

    async def held(self, after: UUID | None) -> list[UUID]:
        """Returns the next page of keys that we hold, in order; none after the last. Raises: ProviderFault."""
        query = {"holder": self._holder, "limit": str(PAGE)}
        if after is not None:
            query["after"] = str(after)
        status, answer = await self._request("GET", "/v1/leases", params=query)
        page = _parsed(_PageAnswer, answer) if status == 200 else _refused(status)
        return [lease.allocation_key for lease in page.leases]

    async def health(self) -> None:
        """Returns if the provider can serve. Raises: ProviderFault."""
        status, _ = await self._request("GET", "/v1/health")
        if status not in (200, 204):
            _refused(status)

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def _request(self, method: str, path: str, **arguments: Any) -> tuple[int, bytes]:
        try:
            async with self._session.request(method, self._url + path, allow_redirects=False, **arguments) as response:
                answer = bytearray()
                async for chunk in response.content.iter_chunked(2**16):
                    answer += chunk
                    if len(answer) > _ANSWER_BYTES:
                        raise ProviderFault(f"the answer is longer than {_ANSWER_BYTES} bytes", lost=False)
                return response.status, bytes(answer)
        except TimeoutError as error:
            raise ProviderFault("no answer in time", lost=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ProviderFault(first_line(error)[:200], lost=True) from error


def _parsed(model: type[_Model], answer: bytes) -> _Model:
    try:
        return model.model_validate_json(answer)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ProviderFault(f"the answer is not as agreed: {where} {fault['msg']}"[:200], lost=False) from error


def _refused(status: int) -> Any:
    """Raises what a status means that no call expects; 5xx may be over in a moment. Raises: ProviderFault."""
    raise ProviderFault(f"status {status}", lost=status >= 500)
