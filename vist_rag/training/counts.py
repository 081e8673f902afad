"""How often each token occurs in a corpus, counted once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from vist_rag.errors import InputError

_TEXTS = 1000  # tokenized at once


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token occurs in a corpus.

    Attributes:
        counts: Occurrences, int64 ``[v]``.
        samples: Texts that were counted.
    """

    counts: Tensor
    samples: int

    @cached_property
    def importance(self) -> Tensor:
        """How much each token matters, float ``[v]``: ``log(|S| / (1 + count))``, in nats; below 0 for the commonest.

        Source: VIST, arXiv:2502.00791, section 3.4.
        """
        return torch.log(self.samples / (1 + self.counts))


def count_tokens(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, *, path: Path | None = None, key: str = ""
) -> TokenCounts:
    """Count every token of a corpus, once: a second call reads what the first has written.

    Args:
        texts: The corpus; not touched where the file is used.
        tokenizer: The generator's. Special tokens that it would add are not counted.
        path: A safetensors file to keep the counts in; None keeps none.
        key: Which corpus this is. A file is used where key and tokenizer are the same, else counted anew, as it is,
            with a warning, where the file is torn.
    Returns:
        Counts of every id that the tokenizer can give.
    Raises:
        InputError: If there are no texts, or they are one string.
        OSError: If the file cannot be opened or written.
    """
    if isinstance(texts, str):
        raise InputError(f"texts must be a list or an iterator of strings, got the string {texts!r:.40}; wrap it.")
    key = _cache_key(tokenizer, key)
    if path is not None and (known := _read_counts(path, key)) is not None:
        return known
    size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    counts, samples = torch.zeros(size, dtype=torch.long), 0
    some = iter(tqdm(texts, desc="counting tokens", unit=" texts", disable=None))
    while batch := list(islice(some, _TEXTS)):
        ids = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no word on texts that are longer than the model reads
        ).input_ids
        counts += torch.bincount(torch.tensor(list(chain.from_iterable(ids)), dtype=torch.long), minlength=size)
        samples += len(batch)
    if not samples:
        raise InputError("texts must hold at least one text, got none; check the data.")
    found = TokenCounts(counts, samples)
    if path is not None:
        _write_counts(found, path, key)
    return found


def _cache_key(tokenizer: PreTrainedTokenizerFast, key: str) -> str:
    """sha256 over the key and what decides the tokens of a text, in hexadecimal."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation", "post_processor"):  # the first two are set anew by every call
        state.pop(name, None)
    return hashlib.sha256(json.dumps([key, state], sort_keys=True).encode()).hexdigest()


def _read_counts(path: Path, key: str) -> TokenCounts | None:
    """What ``_write_counts`` wrote; None where there is nothing, or that of another corpus or tokenizer."""
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("key") != key:
                return None
            found = TokenCounts(file.get_tensor("counts"), int(facts["samples"]))
        if (total := int(found.counts.sum())) != int(facts["tokens"]):
            raise ValueError(f"its counts sum to {total}, not {facts['tokens']}")
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}); counting anew.", stacklevel=3)
        return None
    return found


def _write_counts(found: TokenCounts, path: Path, key: str) -> None:
    """Keep counts in a file, whole or not at all."""
    facts = {"key": key, "samples": str(found.samples), "tokens": str(int(found.counts.sum()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, since several processes may count at once.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save({"counts": found.counts}, metadata=facts))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
