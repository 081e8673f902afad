"""What a table of figures needs to be made again: date, command, commit, versions, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SEED = 0
"""Of the bootstrap intervals; answers are greedy and need none."""

_LARGE_FILE = 100_000_000
_PACKAGES = ("vist-rag", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy")


def run_facts(command: str, seed: int = SEED) -> dict[str, Any]:
    """What a table of figures needs to be made again: date, command, seed, commit, versions, machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vist-rag itself, run from a checkout
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The machine without its name: system, processor, cores, and the device that models run on."""
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "mps" if mps else "cpu",
    }


def _processor() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package runs from, ``+`` behind it where files differ; None without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout that it does not trust
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def directory_hash(directory: Path) -> str:
    """sha256 over the names and contents of a folder's files; of files above 100 MB, the size in the place of it."""
    sha = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        size = path.stat().st_size
        sha.update(f"{path.relative_to(directory).as_posix()}\x00{size}\x00".encode())
        if size <= _LARGE_FILE:
            sha.update(path.read_bytes())
    return sha.hexdigest()
