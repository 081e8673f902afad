"""What is released holds what users need and nothing else, and says so in its metadata; see also ``make dist``."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"vist_rag-{PROJECT['version']}"
ROOMS = {"vist_rag": "vist_rag", "integrations/langchain_vist": "langchain_vist"}
ROOMS |= {"integrations/llama_index_vist": "llama_index_vist"}
INFO = f"{NAME}.dist-info"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, made by the build backend itself: nothing is installed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl")


@pytest.fixture(scope="module")
def sdist(dist: Path) -> set[str]:
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        return {name.removeprefix(f"{NAME}/") for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Metadata:
    """Checked by the rules of the core metadata specifications."""
    return Metadata.from_email(wheel.read(f"{INFO}/METADATA"), validate=True)


def _sources(folder: str) -> set[str]:
    """Files of a folder of the checkout, without what Python and its tools leave there."""
    root = ROOT / folder
    found = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith((".pyc", ".pyo")))
    return {path.relative_to(root).as_posix() for path in found}


def test_the_wheel_is_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"{top}/{name}" for folder, top in ROOMS.items() for name in _sources(folder)}
    own = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    assert set(wheel.namelist()) == expected | {f"{INFO}/{name}" for name in own}


@pytest.mark.parametrize(
    "pattern",
    [
        "vist_rag/assets/model/*/model.safetensors",
        "vist_rag/assets/model/generator/tokenizer.json",
        "vist_rag/assets/noto-sans-10px.safetensors",
        "vist_rag/assets/demo/*.jsonl",
        "vist_rag/training/recipes/*.toml",
        "vist_rag/evaluation/recipes/*.toml",
        "*/py.typed",
    ],
)
def test_what_is_no_python_is_in_the_wheel(wheel: zipfile.ZipFile, pattern: str) -> None:
    counts = {"vist_rag/assets/model/*/model.safetensors": 3, "vist_rag/assets/demo/*.jsonl": 4, "*/py.typed": 3}
    found = [name for name in wheel.namelist() if Path(name).match(pattern)]
    assert len(found) >= counts.get(pattern, 1)
    assert all(wheel.getinfo(name).file_size for name in found if not name.endswith("py.typed"))


def test_the_sdist_has_what_tests_and_documentation_need(sdist: set[str]) -> None:
    needed = {
        "Makefile",
        "README.md",
        "LICENSE",
        "NOTICE",
        "CITATION.cff",
        "SECURITY.md",
        "constraints.txt",
        "PKG-INFO",
    }
    assert needed <= sdist
    for folder in (*ROOMS, "tests", "benchmarks"):
        assert {f"{folder}/{name}" for name in _sources(folder) if not name.endswith(".jsonl")} <= sdist
    inside = {name.partition("/")[0] for name in sdist if "/" in name}
    assert inside <= {"vist_rag", "integrations", "tests", "docs", "benchmarks", "notebooks"}
    assert not any(name.startswith("docs/_build") or name.endswith((".pyc", ".sqlite")) for name in sdist)


def test_metadata_is_valid_and_complete(metadata: Metadata, wheel: zipfile.ZipFile) -> None:
    assert (metadata.name, str(metadata.version)) == ("vist-rag", PROJECT["version"])
    assert metadata.metadata_version == "2.4"
    assert metadata.license_expression == "Apache-2.0 AND OFL-1.1"
    assert metadata.license_files == ["LICENSE", "NOTICE"]
    assert not any(line.startswith("License ::") for line in metadata.classifiers)  # the expression says it
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata.description_content_type == "text/markdown"
    assert set(metadata.provides_extra) == set(PROJECT["optional-dependencies"])
    assert wheel.read(f"{INFO}/entry_points.txt").decode() == "[console_scripts]\nvist-rag = vist_rag.cli:app\n"


def test_every_python_that_is_claimed_is_tested() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("an sdist has no workflows")
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    claimed = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert jobs["test"]["strategy"]["matrix"]["python"] == claimed
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert steps == ["make test", "make lint", "make docs", "make dist"]


def test_forms_for_issues_are_whole() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    if not folder.exists():
        pytest.skip("an sdist has no forms")
    forms = [path for path in folder.glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for form in map(yaml.safe_load, (path.read_text(encoding="utf-8") for path in forms)):
        asked = [field for field in form["body"] if field["type"] != "markdown"]
        assert {"name", "description", "body"} <= set(form)
        assert len({field["id"] for field in asked}) == len(asked)
        assert all(field["attributes"]["label"] for field in asked)
        assert any(field.get("validations", {}).get("required") for field in asked)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] in PROJECT["license"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2502.00791"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
