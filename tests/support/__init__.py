"""Real parts for tests: servers that are started once per session, and cheap fresh databases and buckets on them."""

import functools

import docker  # type: ignore[import-untyped]  # it ships no types


@functools.cache
def docker_answers() -> bool:
    """Tell whether a Docker engine answers within two seconds; asked once per session."""
    try:
        client = docker.from_env(timeout=2)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.APIError, OSError):
        return False
    finally:
        client.close()
