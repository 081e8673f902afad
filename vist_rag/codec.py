"""How a memory is stored: latents to bytes and back, in float16 or in a few bits a number.

In a form of ``b`` bits, each column of a memory (one of the ``d`` numbers that a latent has, over its ``n`` latents)
is cut in ``2**b - 1`` equal steps from its smallest to its largest number. Both ends are kept in float16. So nothing
has to be learned, and a column is as exact as it is narrow: columns of one memory differ by twenty times in spread, and
some lie far from zero (``docs/explanation/memory-size.md``).

What is stored is what the compressor made, before any fusion: a memory is stored once for all generators.

Layout, little-endian: ``float16`` is the numbers ``[n, d]``. ``intB`` is the smallest number of each column, float16
``[d]``; the largest, float16 ``[d]``; then the steps ``[n, d]`` as ``b`` planes of bits, the lowest bits first, each
plane of ``n * d`` bits (the first number in the highest bit of a byte) filled up to whole bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vist_rag.errors import ConfigError, InputError, StoreError

FORMS: Mapping[str, int] = MappingProxyType({"float16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2})
"""Forms of a stored memory, and the bits that each number takes."""

DEFAULT_FORM = "float16"
"""Of a compressor whose smaller forms nobody has measured; one that is measured names its own (``VistConfig``)."""


def size_bytes(form: str, n: int, d: int) -> int:
    """Bytes of a memory of ``n`` latents of width ``d``.

    Raises:
        ConfigError: If there is no such form.
    """
    check_form(form)
    return 2 * n * d if form == "float16" else 4 * d + FORMS[form] * -(-n * d // 8)


def encode(latents: ArrayLike, form: str = DEFAULT_FORM) -> bytes:
    """Latents as they are stored. What was decoded is encoded to the very same bytes.

    Args:
        latents: float ``[n, d]``, of one memory.
        form: One of ``FORMS``.
    Raises:
        ConfigError: If there is no such form.
        InputError: If latents are not a float array ``[n, d]`` with something in it, or not finite in float16.
    """
    check_form(form)
    given = np.asarray(latents)
    if given.ndim != 2 or not given.size or not np.issubdtype(given.dtype, np.floating):
        raise InputError(
            f"latents must be a float array [n, d], got {given.dtype} {list(given.shape)}; give those of one passage."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
        half = np.ascontiguousarray(given, dtype="<f2")
    if not np.isfinite(half).all():
        raise InputError(
            f"latents must be finite in float16 (65504 at most), got {given[~np.isfinite(half)][0]:g}; scale them."
        )
    if form == "float16":
        return half.tobytes()
    numbers, top = given.astype(np.float32), 2 ** FORMS[form] - 1
    low, high = numbers.min(axis=0), numbers.max(axis=0)
    ends = np.stack((half.min(axis=0), half.max(axis=0)))
    ends += np.float16(0)  # -0.0 is 0.0: which of them is the smaller is for no one to say
    # By the ends as they were, not as they are rounded: so both of them are reached, which makes encoding idempotent.
    spread = np.where(ends[1] > ends[0], high - low, np.float32(np.inf))
    steps = np.rint((numbers - low) / spread * top).astype(np.uint8)
    planes = np.packbits(steps.reshape(1, -1) >> _shifts(form) & 1, axis=1)
    return ends.tobytes() + planes.tobytes()


def decode(data: bytes, form: str, n: int, d: int) -> NDArray[np.float32]:
    """What ``encode`` stored, float32 ``[n, d]``.

    Args:
        data: As stored.
        form: In which form.
        n: Latents.
        d: Width of a latent.
    Raises:
        StoreError: If there is no such form, or the data is not ``n x d`` finite numbers in it.
    """
    if form not in FORMS:
        raise StoreError(
            f"a stored memory must be in one of the forms {', '.join(FORMS)}, got {form!r}, which a newer version of "
            "vist-rag may have written; use that one, or compress the passage anew."
        )
    if n < 1 or d < 1 or len(data) != size_bytes(form, n, d):
        raise StoreError(
            f"a stored memory of {n} x {d} numbers in {form} must be {size_bytes(form, max(n, 0), max(d, 0))} bytes, "
            f"got {len(data)}; restore the store from a copy, or compress the passage anew."
        )
    if form == "float16":
        numbers = np.frombuffer(data, "<f2").reshape(n, d).astype(np.float32)
        _require(bool(np.isfinite(numbers).all()), form)
        return numbers
    low, high = np.frombuffer(data, "<f2", count=2 * d).reshape(2, d).astype(np.float32)
    spread = high - low
    _require(bool((spread >= 0).all() and np.isfinite(spread).all()), form)
    planes = np.frombuffer(data, np.uint8, offset=4 * d).reshape(FORMS[form], -1)
    bits = np.unpackbits(planes, axis=1, count=n * d)
    steps = bits[0]
    for shift, plane in enumerate(bits[1:], start=1):
        steps = steps | plane << shift
    steps, top = steps.reshape(n, d), 2 ** FORMS[form] - 1
    decoded: NDArray[np.float32] = steps * (spread / np.float32(top)) + low
    np.copyto(decoded, high, where=steps == top)  # exactly: a sum would round a small end away beside a large one
    return decoded


def check_form(form: str) -> None:
    """Do nothing, or raise :class:`ConfigError` where there is no such form."""
    if form not in FORMS:
        raise ConfigError(f"form of a memory must be one of {', '.join(FORMS)}, got {form!r}.")


def _shifts(form: str) -> NDArray[np.uint8]:
    return np.arange(FORMS[form], dtype=np.uint8)[:, None]


def _require(sound: bool, form: str) -> None:
    if not sound:
        raise StoreError(
            f"a stored memory in {form} must be finite numbers in order, got others, so it is damaged; restore the "
            "store from a copy, or compress the passage anew."
        )
