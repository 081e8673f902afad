"""What every test gets: two threads at most, no network, and the data sets where there are any."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before a test imports torch or a Hugging Face library, which read these once. Both say the same: torch goes by the
# second, and processes of several threads each, as many as there are cores, wait for each other at full load.
_asked = os.environ.get("OMP_NUM_THREADS", "")
THREADS = min(int(_asked), 2) if _asked.isdigit() and int(_asked) > 0 else 2
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class NetworkBlockedError(RuntimeError):
    """A test reached for the network."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host is None or host in ("", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host).split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(scope="session")
def _attempts() -> Iterator[list[str]]:
    """Let sockets reach this machine only; list what else was tried, also by code that swallows the error."""
    attempts: list[str] = []

    def refuse(host: object) -> None:
        if not _is_local(host):
            attempts.append(str(host))
            raise NetworkBlockedError(f"tests run without a network, got a connection to {host!r}")

    def guarded(method: Any) -> Any:
        def call(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(args[-1][0])
            return method(self, *args)

        return call

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield attempts


@pytest.fixture(autouse=True)
def _no_network(_attempts: list[str]) -> Iterator[None]:
    """Fail the test that reached for the network."""
    before = len(_attempts)
    yield
    tried = _attempts[before:]
    assert not tried, f"tests run without a network, this one tried {tried}"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The data sets (``corpus/``, ``reader/``, ``qa/``, ...) that VIST_RAG_DATA points at."""
    value = os.environ.get("VIST_RAG_DATA", "")
    if not value:
        pytest.skip("VIST_RAG_DATA is not set; point it at a folder with the data sets")
    path = Path(value)
    if not path.is_dir():
        pytest.skip(f"VIST_RAG_DATA is {value!r}, which is not a folder")
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and there is none")
