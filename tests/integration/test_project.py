"""The project's own files agree with each other."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_version_is_the_newest_in_the_changelog(pyproject: dict[str, Any]) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == pyproject["project"]["version"]


def test_every_dependency_has_a_pin_that_its_range_allows(pyproject: dict[str, Any]) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): pin
        for name, _, pin in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }
    project = pyproject["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert name in pins, f"constraints.txt does not pin {name}"
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow the pin {pins[name]}"


def test_all_is_every_extra_that_a_user_needs(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    apart = {"all", "dev", "docs", "llmlingua", "bnb"}  # bitsandbytes has no wheel for every machine
    assert extras["all"] == [f"vist-rag[{','.join(sorted(set(extras) - apart))}]"]


def test_no_file_points_outside_the_repository() -> None:
    forbidden = {"../" + "shared": {ROOT / ".ci" / "run"}}
    if len(str(ROOT)) > 8:  # shorter ones, like /src, are words that a text may well contain
        forbidden[str(ROOT)] = set()
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in _tracked()
        for text, allowed in forbidden.items()
        if path not in allowed and text.encode() in path.read_bytes()
    ]
    assert not found


def test_readme_is_in_the_package_and_its_python_compiles(pyproject: dict[str, Any]) -> None:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    assert pyproject["project"].get("readme") == "README.md"
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_every_makefile_target_is_described() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    described = re.findall(r"^([a-z]+):.*## \S", makefile, flags=re.MULTILINE)
    assert sorted(described) == sorted(phony[1].split())


def test_torch_takes_no_more_threads_than_the_tests_were_given() -> None:
    import torch

    assert torch.get_num_threads() == min(int(os.environ["OMP_NUM_THREADS"]), os.cpu_count() or 1)
