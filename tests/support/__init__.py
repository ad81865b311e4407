"""Real parts for tests: servers that are started once per session, and cheap fresh databases and buckets on them."""

import functools
import os
import socket

import docker

_TIMEOUT_SECONDS = 2.0


@functools.cache
def docker_answers() -> bool:
    """Tell whether a Docker engine answers within two seconds; asked once per session."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://"):
        # Asked first by a socket of our own: the client leaves its own open when nobody listens (a ResourceWarning).
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_TIMEOUT_SECONDS)
            try:
                probe.connect(host.removeprefix("unix://"))
            except OSError:
                return False
    try:
        client = docker.from_env(timeout=_TIMEOUT_SECONDS)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.APIError, OSError):
        return False
    finally:
        client.close()
