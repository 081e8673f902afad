"""Short versions of the durability benchmarks; and that what they look for, they find."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.support.benchmarks import FOLDER, load_benchmark
from vist_rag.types import Passage


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    return load_benchmark("chaos")


def run(name: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark prints as JSON; run as people run it, since it starts processes of its own."""
    command = [sys.executable, FOLDER / f"{name}.py", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_kills_at_random_moments_lose_nothing() -> None:
    result = run("chaos", "--kills", "12", "--seed", "1")
    assert result["failures"] == []
    assert sum(result["killed_while"].values()) == 12


def test_many_ask_while_another_process_writes() -> None:
    result = run("soak", "--seconds", "3", "--askers", "8", "--questions", "6")
    for what in ("wrong_answers", "errors", "writer_error", "problems_afterwards"):
        assert not result[what], result[what]
    assert result["answers"] > 8
    assert result["writer_batches"] > 0


def filled(chaos: ModuleType, directory: Path) -> tuple[object, object]:
    """An index and its state after some calls."""
    state = chaos.State()
    index = chaos.open_index(directory)
    for number in range(6):
        call = chaos.Call.of(number, 0)
        call.run(index)
        state = call.after(state)
    return index, state


def test_the_state_that_is_worked_out_is_what_an_index_holds(chaos: ModuleType, tmp_path: Path) -> None:
    index, state = filled(chaos, tmp_path)
    for number in range(6, 40):
        call = chaos.Call.of(number, 0)
        call.run(index) if call.what != "reopen" else None
        state = call.after(state)
        found, wrong = chaos.differences(index, state, state)
        assert wrong == []
        assert found == state


def test_what_is_lost_or_wrong_is_told(chaos: ModuleType, tmp_path: Path) -> None:
    index, state = filled(chaos, tmp_path)
    assert chaos.differences(index, state, state)[1] == []
    passage = next(iter(state.passages.values()))

    lost = state.copy()
    lost.passages["p-lost"] = Passage("acknowledged and gone", "p-lost")
    assert "1 of the acknowledged differ" in chaos.differences(index, lost, lost)[1][0]
    lost = state.copy()
    lost.memories.add((passage.content, "two"))
    index.delete_memories([passage.content], fingerprint="two")
    assert "1 acknowledged memories are lost" in chaos.differences(index, lost, lost)[1][0]

    index.put_memories({passage.content: chaos.memory_of("another text", "one")}, "one")
    assert any("by one is wrong" in line for line in chaos.differences(index, state, state)[1])
    index.put_memories({"nobody's": np.ones((2, 2))}, "one")
    with closing(sqlite3.connect(tmp_path / "passages.sqlite")) as raw:
        raw.execute("UPDATE passages SET source = 'changed' WHERE id = ?", (passage.id,))
        raw.commit()
    with pytest.raises(Exception, match="is damaged"):
        chaos.differences(index, state, state)
