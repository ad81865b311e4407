"""The contract's reasons, the table of codes and the exceptions of all services belong together, one to one."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest

from services.errors import DomainError
from services.status import code_of, reasons

PACKAGES = ("services", "allocator", "persona_store", "session_tracker", "archiver")


def subclasses(cls: type[DomainError]) -> set[type[DomainError]]:
    return {cls, *(found for child in cls.__subclasses__() for found in subclasses(child))}


def all_errors() -> list[type[DomainError]]:
    for name in PACKAGES:
        package = import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if ".migration" not in module.name and "cli" not in module.name:
                import_module(module.name)
    return sorted(subclasses(DomainError) - {DomainError}, key=lambda cls: (cls.__module__, cls.__name__))


def test_every_reason_of_the_contract_has_a_code() -> None:
    for reason in reasons():
        assert code_of(reason).value[0] > 0


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_exception_has_a_reason_of_the_contract(cls: type[DomainError]) -> None:
    assert cls.reason in reasons()
    assert cls.__doc__


def test_no_reason_of_the_contract_is_without_a_user() -> None:
    raised = {cls.reason for cls in all_errors()}
    assert reasons() - raised == set()
