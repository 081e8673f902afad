"""Every error that vist-rag raises on purpose.

Messages name what is wrong, what was got, what is allowed, and the remedy.
"""

from __future__ import annotations


class VistError(Exception):
    """Base class: ``except VistError`` catches whatever this package raises on purpose."""


class ConfigError(VistError, ValueError):
    """A setting or an argument is outside what is allowed."""


class InputError(VistError, ValueError):
    """A file, a text or a question cannot be used as it is."""


class ShapeError(VistError, ValueError):
    """A tensor does not have the shape that the receiving part was built for."""


class CheckpointError(VistError):
    """A checkpoint is missing, incomplete, torn, or not of the kind that was asked for."""


class StoreError(VistError):
    """The passage store cannot be opened, read or written."""


class IncompatibleMemoryError(VistError):
    """A memory was made by another compressor than the generator's fusion was trained for."""


class ServerError(VistError):
    """A server that was asked to generate cannot be reached, refuses, or breaks off."""


class MissingDependencyError(VistError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed; pip install 'vist-rag[{extra}]'.")
