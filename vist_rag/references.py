"""Models that a checkpoint needs but does not hold: where they are, and the sha256 that their weights must have."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vist_rag.errors import CheckpointError, ConfigError

_WEIGHTS = "*.safetensors"
_NEEDED = ("*.json", _WEIGHTS, "*.model", "*.txt", "*.jinja")
_NOT_NEEDED = ("*/*", "consolidated*")  # variants for other libraries, among them the same weights once more
_DTYPES = (None, "float32", "bfloat16", "float16")
_CHUNK = 1 << 24
_SHOWN = 1 << 30  # bytes that take seconds


@dataclass(frozen=True, slots=True)
class Reference:
    """Pretrained weights that stay where they are.

    Attributes:
        id: Hub id, or a local directory, absolute.
        revision: Commit on the hub; None for a local directory.
        sha256: Of the weights, in hexadecimal (``weights_sha256``).
        dtype: What the weights were rounded to before training read them, such as ``"bfloat16"``: they are rounded to
            it again before they are used in any other precision. None: to nothing.
    """

    id: str
    revision: str | None
    sha256: str
    dtype: str | None = None

    @classmethod
    def of(cls, id: str | Path, revision: str | None = None) -> Reference:
        """Refer to a model as it is now.

        Args:
            id: Hub id, or a local directory.
            revision: Branch, tag or commit on the hub; what is kept is the commit.
        Raises:
            CheckpointError: If there is no such model, or it has no safetensors weights.
            ConfigError: If a local directory is given a revision.
        """
        directory = resolve(id, revision)
        if Path(id).is_dir():
            return cls(str(directory.absolute()), None, weights_sha256(directory))
        return cls(str(id), directory.name, weights_sha256(directory))

    @classmethod
    def read(cls, stored: Any, source: str | Path) -> Reference:
        """The reference in a JSON object; ``source`` is the file that an error names.

        Raises:
            CheckpointError: If it is none.
        """
        names = [field.name for field in fields(cls)]
        got: dict[str, Any] = {name: stored.get(name) for name in names} if isinstance(stored, Mapping) else {}
        if (
            not (isinstance(got.get("id"), str) and got["id"])
            or not re.fullmatch("[0-9a-f]{64}", str(got["sha256"]))
            or not isinstance(got["revision"], str | None)
            or got["dtype"] not in _DTYPES
        ):
            raise CheckpointError(f"reference in {source} must have {', '.join(names)}, got {stored!r}; restore it.")
        return cls(**got)

    def directory(self) -> Path:
        """Where the model is (downloaded where it is missing), its weights verified.

        Raises:
            CheckpointError: If it is not to be had, or has other weights.
        """
        directory = resolve(self.id, self.revision)
        got = weights_sha256(directory)
        if got != self.sha256:
            version = f"revision {self.revision}" if self.revision else "the directory"
            raise CheckpointError(
                f"model {self.id} must have the weights that this checkpoint was trained with, sha256 "
                f"{self.sha256[:12]}, got {got[:12]}; restore {version}, or train anew."
            )
        return directory

    def check(self, part: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Refuse to leave weights out of a checkpoint that are not the referenced ones, bit for bit.

        Args:
            part: What an error calls them.
            ours: Weights by name.
            theirs: Those of the referenced model.
        Raises:
            ConfigError: If one is missing, left over, or differs.
        """
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or not _identical(ours[name], theirs[name]):
                raise ConfigError(
                    f"{part} must have the weights of {self.id}, bit for bit, to be left out of a checkpoint, got "
                    f"another {name}; store it whole (give no reference), or keep it frozen in training."
                )


def _identical(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs.cpu())


def resolve(id: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Directory of a model: a local one as it is, else a snapshot of the hub (config, tokenizer and safetensors).

    Args:
        id: Hub id, or a local directory.
        revision: Branch, tag or commit on the hub.
        weights: Whether the safetensors are needed; without them, a download is of a few megabytes.
    Raises:
        CheckpointError: If it is neither a directory nor to be had from the hub.
        ConfigError: If a local directory is given a revision.
    """
    if Path(id).is_dir():
        if revision is not None:
            raise ConfigError(f"revision must be None for the local directory {id}, got {revision!r}; leave it out.")
        return Path(id)
    from huggingface_hub import snapshot_download

    try:
        needed = [pattern for pattern in _NEEDED if weights or pattern != _WEIGHTS]
        return Path(
            snapshot_download(str(id), revision=revision, allow_patterns=needed, ignore_patterns=list(_NOT_NEEDED))
        )
    except Exception as error:  # the hub's errors have no common base class
        version = f" (revision {revision})" if revision else ""
        raise CheckpointError(
            f"model must be a local directory or a hub id, got {str(id)!r}{version} ({error}); restore it, or correct "
            "its id: what counts is the sha256 of its weights."
        ) from error


def weights_sha256(directory: Path) -> str:
    """sha256 over the names, sizes and bytes of the safetensors files that transformers reads, in hexadecimal.

    Raises:
        CheckpointError: If there are none (pickle is not read: it can run code), one is missing, or an adapter stands
            beside them, which transformers would apply.
    """
    files = _weight_files(directory)
    total = sum(file.stat().st_size for file in files)
    sha = hashlib.sha256()
    with tqdm(
        total=total, desc=f"verifying {directory.name}", unit="B", unit_scale=True, disable=total < _SHOWN
    ) as bar:
        for file in files:
            sha.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    sha.update(chunk)
                    bar.update(len(chunk))
    return sha.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    # Of what transformers reads, not of all that is there: a cache of the hub may hold more files or fewer.
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"model in {directory} must be a whole model, got an adapter; merge it into its base.")
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise CheckpointError(
            f"model in {directory} must have its weights in model.safetensors, got none (pickle is not read, as it can "
            "run code); load it with transformers and write it with save_pretrained."
        )
    try:
        files = [directory / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}); restore it.") from error
    for file in files:
        if file.suffix != ".safetensors" or not file.is_file():
            raise CheckpointError(f"model in {directory} must hold {file.name} as a safetensors file; restore it.")
    return files
