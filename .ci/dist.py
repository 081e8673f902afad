"""Build wheel and sdist, install the wheel into a clean environment, and try it there. Run by ``make dist``.

What does not hold ends it with an error. Prints sizes and seconds; ``--json`` writes them down as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
RESULT = ROOT / "benchmarks" / "results" / "release.json"
OFFLINE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Build, try, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.relative_to(ROOT)} as well")
    write = parser.parse_args().json
    with tempfile.TemporaryDirectory(prefix="vist-rag-dist-") as scratch:
        folder = Path(scratch)
        wheel, sdist = _build(folder)
        report = {
            "wheel": _size(wheel) | {"name": wheel.name, "files": len(zipfile.ZipFile(wheel).namelist())},
            "sdist": _size(sdist) | {"name": sdist.name, "tests_collected": _collected(sdist, folder)},
            "environment": _install(wheel, folder / "venv"),
            "smoke_test": _smoke(folder),
        }
    print(json.dumps(report, indent=2))
    if write:
        from vist_rag.evaluation.provenance import run_facts

        RESULT.write_text(json.dumps(report | run_facts("make dist ARGS=--json"), indent=2) + "\n", encoding="utf-8")


def _run(*command: object, cwd: Path, quiet: bool = False) -> str:
    """What the command prints; its output is shown, and it all ends, where it fails."""
    print("+", *command, file=sys.stderr, flush=True)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=OFFLINE, text=True, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}: {' '.join(map(str, command))}")
    if not quiet:
        print(done.stdout, end="", file=sys.stderr)
    return done.stdout


def _build(scratch: Path) -> tuple[Path, Path]:
    """The wheel that the sdist builds, which is the one that the checkout builds, and the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT, cwd=scratch, quiet=True)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    direct = scratch / "direct"
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", direct, ROOT, cwd=scratch, quiet=True)
    if _sha256(wheel) != _sha256(direct / wheel.name):
        sys.exit(f"{sdist.name} builds another {wheel.name} than the checkout: a file is missing from the sdist.")
    return wheel, sdist


def _collected(sdist: Path, scratch: Path) -> int:
    """Tests that pytest finds in the unpacked sdist, by the code that is in it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    tree = scratch / sdist.name.removesuffix(".tar.gz")
    pytest = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    return sum("::" in line for line in _run(*pytest, cwd=tree, quiet=True).splitlines())


def _install(wheel: Path, venv: Path) -> dict[str, Any]:
    """A new environment with the wheel, the embedder that needs no network, and the versions of constraints.txt."""
    start = time.perf_counter()
    _run(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    _run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[offline]", cwd=venv.parent)
    size = sum(path.stat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
    return {"install_s": round(time.perf_counter() - start, 1), "bytes": size, "mb": round(size / 1e6, 1)}


def _smoke(scratch: Path) -> dict[str, Any]:
    """The smoke test, by the Python of the environment, in a folder that holds nothing of the project."""
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    told = _run(scratch / "venv" / "bin" / "python", "-I", ROOT / ".ci" / "smoke.py", cwd=elsewhere)
    result: dict[str, Any] = json.loads(told.splitlines()[-1])
    return result


def _size(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "mb": round(path.stat().st_size / 1e6, 1), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
