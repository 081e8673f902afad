"""What a stage keeps on disk: the weights that it trains, whole checkpoints, its log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vist_rag.errors import CheckpointError

if TYPE_CHECKING:
    from vist_rag.training.reading import MemoryReading


def save_trained(model: nn.Module, path: Path, kept: set[str], state: Mapping[str, Tensor] | None = None) -> None:
    """Write the named weights of a model; weights that are tied are written once."""
    state = model.state_dict() if state is None else state
    seen: dict[int, str] = {}
    named = {}
    for name in sorted(kept):
        tensor = state[name].detach()
        if seen.setdefault(tensor.data_ptr(), name) == name:
            named[name] = tensor.cpu().contiguous()
    save_file(named, str(path), metadata={"format": "pt"})


def load_trained(model: nn.Module, path: Path) -> set[str]:
    """Read what ``save_trained`` wrote into a model, and return the names; all else stays as it is.

    Raises:
        CheckpointError: If the file is missing, or does not fit the model.
    """
    return _load(model, _read(path), path)


def load_parts(model: MemoryReading, directory: Path) -> set[str]:
    """Weights of an earlier stage, of the tower alone or of more; returns their names.

    Raises:
        CheckpointError: If the file is missing, or does not fit.
    """
    path = directory / "model.safetensors"
    state = _read(path)
    tower = {name.removeprefix("tower."): weight for name, weight in state.items() if name.startswith("tower.")}
    if not tower:
        return _load(model, state, path)
    return {f"compressor.tower.{name}" for name in _load(model.compressor.tower, tower, path)}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} must be the weights of a finished stage, got no such file; train it first.")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to train it again.") from error


def _load(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> set[str]:
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for name, weight in state.items():
        if (got := list(weight.shape)) != (wanted := shapes.get(name)):
            why = f"{name} must be {wanted}, got {got}" if wanted is not None else f"{name} has no place in it"
            raise CheckpointError(f"{path} does not fit this recipe ({why}); train from the start, or elsewhere.")
    model.load_state_dict(state, strict=False)
    return set(state)


def last_checkpoint(directory: Path) -> Path | None:
    """The last checkpoint that is whole; its state is what is written last."""
    found = [path for path in directory.glob("checkpoint-*") if step_of(path) > 0]
    for path in sorted(found, key=step_of, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue  # of a run that was killed while it saved
        return path
    return None


def step_of(checkpoint: Path | None) -> int:
    """Steps that were made before a checkpoint; 0 for none."""
    number = checkpoint.name.rpartition("-")[2] if checkpoint else ""
    return int(number) if number.isdecimal() else 0


def rewind(log: Path, step: int) -> None:
    """Cut off what was logged after a step, and a torn last line: these steps are made again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except ValueError:
            continue
    unfinished = log.with_name(f"{log.name}.part")
    unfinished.write_text("".join(kept), "utf-8")
    unfinished.replace(log)


def trained_names(model: nn.Module) -> set[str]:
    """Names of the weights that a stage changes."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}
