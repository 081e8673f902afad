"""``vist-rag costs --passages`` and ``--measure-rates``: what a corpus takes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vist_rag.cli.models import load_compressor_of
from vist_rag.cli.terminal import emit_json, out, progress, say, working

if TYPE_CHECKING:
    from vist_rag.types import Passage

_SAMPLE = 512
_REPEATS = 3


def measure(model: str | None, data: Path | None, words: int) -> dict[str, Any]:
    """The rates of this machine, over a sample of a file, or of the corpus of ``vist-rag demo``."""
    with working("reading the sample"):
        from vist_rag.evaluation.provenance import run_facts
        from vist_rag.evaluation.sizing import FORMAT, measure_rates
        from vist_rag.retrieval import SentenceTransformerEmbedder

        passages = _sample(data, words)
    compressor = load_compressor_of(model)
    with progress("measuring", 3 * _REPEATS) as advance:
        rates = measure_rates(SentenceTransformerEmbedder(), compressor, passages, repeats=_REPEATS, advance=advance)
    return {"format": FORMAT, **run_facts(shlex.join(["vist-rag", *sys.argv[1:]])), **rates}


def _sample(data: Path | None, words: int) -> list[Passage]:
    """Up to 512 passages, from all over the corpus."""
    if data is None:
        from vist_rag.evaluation.demo import demo_passages

        passages = demo_passages()
    else:
        from vist_rag.retrieval import read_passages

        passages = list(read_passages(data, words=words))
    return passages[:: -(-len(passages) // _SAMPLE)]


def write_rates(rates: dict[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Rates into a file, or on the screen."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rates, indent=2) + "\n", "utf-8")
        say(f"{output} is written; vist-rag costs --passages 1M --rates {output} reads it.")
    if as_json:
        emit_json(rates)
    elif output is None:
        out.print_json(json.dumps(rates))


def show_sizes(
    sizes: str,
    rates: Callable[[], dict[str, Any]],
    machines: int,
    price_per_hour: float | None,
    *,
    as_json: bool,
) -> None:
    """The table."""
    from vist_rag.evaluation.sizing import parse_sizes, size_of, table

    numbers = parse_sizes(sizes)
    found = rates()
    how: dict[str, Any] = {"machines": machines, "price_per_hour": price_per_hour}
    if as_json:
        emit_json({"rates": found, **how, "sizes": [size_of(found, number, **how) for number in numbers]})
    else:
        out.print(table(found, numbers, **how), markup=False, soft_wrap=True)
