"""Redaction of config snapshots, and the refusal of what PostgreSQL's jsonb cannot hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from session_tracker.snapshots import REDACTED, redact


@pytest.mark.parametrize(
    "name",
    [
        "secret", "client_secret", "TOKEN", "accessToken", "password", "db_passwd", "apikey", "API_KEY", "x-cookie",
        "Cookies", "Authorization", "credentials",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["s3cr3t", 7, None, ["s3cr3t"], {"deep": "s3cr3t"}])
def test_values_whose_names_look_like_secrets_are_redacted(name: str, value: Any) -> None:
    snapshot = {"proxy": [{"host": "h", name: value}], "pages": 3}
    assert json.loads(redact(snapshot)) == {"proxy": [{"host": "h", name: REDACTED}], "pages": 3}


def test_everything_else_stays() -> None:
    snapshot = {"keyword": "노트북", "deep": {"list": [1, 2.5, None, True, {"a": "b"}]}, "keys": "not an api one"}
    assert json.loads(redact(json.loads(json.dumps(snapshot)))) == snapshot


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": "\\u0000"}', "U+0000"),
        ('{"a\\u0000": 1}', "U+0000"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": [1e999]}', "finite"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "levels"),
    ],
)
def test_what_cannot_be_stored_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        redact(json.loads(text))
