"""How the latents of a memory are stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vist_rag.errors import ConfigError, InputError

DEFAULT_FORM = "float16"


FORMS = ("float16",)


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ConfigError(f"memory form must be one of {', '.join(FORMS)}, got {form!r}.")


def encode(latents: NDArray[np.floating], form: str) -> bytes:
    if latents.ndim != 2 or not latents.size or not np.issubdtype(latents.dtype, np.floating):
        raise InputError(
            f"latents must be a float array [n, d], got {latents.dtype} {list(latents.shape)}; give the latents of one passage."
        )
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(latents, dtype="<f2")
    if not np.isfinite(half).all():
        raise InputError("latents must be finite in float16, got NaN or numbers beyond float16; scale the latents.")
    return half.tobytes()


def decode(data: bytes, form: str, n: int, d: int) -> NDArray[np.float16]:
    return np.frombuffer(data, "<f2").reshape(n, d).astype(np.float16)
