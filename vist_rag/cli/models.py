"""Open what commands work with: the index, the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vist_rag.cli.terminal import say, working
from vist_rag.errors import CheckpointError, VistError

if TYPE_CHECKING:
    from vist_rag.compression import PassageCompressor, VistCompressor
    from vist_rag.fidelity import GuardMode
    from vist_rag.generation import VistGenerator
    from vist_rag.pipeline import VistRAG
    from vist_rag.retrieval import PassageIndex


def open_existing(directory: Path) -> PassageIndex:
    """Open an index that must be there already; writable where its directory is.

    Raises:
        StoreError: If there is none, or it cannot be opened.
    """
    with working("opening the index"):
        from vist_rag.retrieval import PassageIndex

        # Opened for writing, a misspelt directory would be made and found empty.
        return PassageIndex.open(directory, read_only=not (directory / "passages.sqlite").is_file())


def load_rag(model: str | None, index: PassageIndex, *, guard: str = "on") -> VistRAG:
    """The pipeline of a checkpoint over an index.

    Raises:
        ConfigError: If there is no such guard, or it is to be strict and the checkpoint was never measured.
        CheckpointError: If the checkpoint cannot be loaded, whatever is wrong with its files.
    """
    with working("loading the model"), readable(model):
        from vist_rag.pipeline import VistRAG

        return VistRAG.from_pretrained(model, index, guard=cast("GuardMode", guard))


def load_parts(model: str | None) -> tuple[Path, dict[str, Any], VistCompressor, VistGenerator]:
    """A checkpoint's directory, settings, compressor and generator; errors as :func:`load_rag`."""
    with working("loading the model"), readable(model):
        from vist_rag.checkpoint import find_checkpoint, load_compressor, read_settings
        from vist_rag.generation import VistGenerator

        directory = find_checkpoint(model)
        settings = read_settings(directory)
        generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion")
        return directory, settings, _vist(load_compressor(directory)), generator


def load_compressor_of(model: str | None) -> VistCompressor:
    """The compressor of a checkpoint; errors as :func:`load_rag`."""
    with working("loading the compressor"), readable(model):
        from vist_rag.checkpoint import find_checkpoint, load_compressor

        return _vist(load_compressor(find_checkpoint(model)))


def _vist(compressor: PassageCompressor) -> VistCompressor:
    from vist_rag.compression import VistCompressor

    if not isinstance(compressor, VistCompressor):
        raise CheckpointError(
            f"--model must be a compressor that reads pictures, got {type(compressor).__name__}; the baselines are for "
            "vist-rag eval alone."
        )
    return compressor


@contextmanager
def readable(model: str | None) -> Iterator[None]:
    """Files of a checkpoint come from anywhere: whatever they make a library raise is an error of the checkpoint."""
    try:
        yield
    except VistError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {model or 'of this package'} cannot be loaded ({type(error).__name__}: {error}); restore its "
            "files, or give another --model."
        ) from error


def tell_of_other_memories(index: PassageIndex, directory: Path, fingerprint: str) -> int:
    """Say how many memories in an index another compressor made: they are not read, passages are encoded anew.

    Returns:
        How many.
    """
    counts = index.fingerprints()
    others = sum(n for name, n in counts.items() if name != fingerprint)
    if others and counts.get(fingerprint, 0) < len(index):
        names = ", ".join(sorted(name[:12] for name in counts if name != fingerprint))
        say(
            f"note: {directory} holds {others:,} memories of another compressor ({names}); passages are encoded anew "
            f"for this one ({fingerprint[:12]}). The former stay.",
            style="yellow",
        )
    return others
