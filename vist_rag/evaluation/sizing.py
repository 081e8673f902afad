"""What a corpus of any size takes: bytes, hours, cost; from rates that were measured on a sample, here or elsewhere.

What is measured is measured in one place, ``measure_rates``, and kept with date, machine and command. Everything else
is multiplication, in ``size_of``: nothing here knows a number of its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vist_rag import codec
from vist_rag.compression import VistCompressor
from vist_rag.errors import ConfigError, InputError
from vist_rag.retrieval import Embedder, GivenVectors, PassageIndex
from vist_rag.types import Passage

FORMAT = "vist-rag-rates/1"
FACTORIES = ("Flat", "IVF2048,PQ48")
"""FAISS indexes whose bytes are told: the exact one, and one that keeps 48 bytes of a vector."""

_ROW_BYTES = 8  # FAISS keeps the number of each row
_LISTED_BYTES = 8  # and an inverted list keeps it once more


def measure_rates(
    embedder: Embedder,
    compressor: VistCompressor,
    passages: Sequence[Passage],
    *,
    repeats: int = 3,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Embed, compress and store a sample, and time it.

    Args:
        embedder: Makes the vectors.
        compressor: Makes the memories.
        passages: The sample; the more like the corpus to be sized, the better.
        repeats: Timed runs of each, after one over a part of the sample; the median counts.
        advance: Called with 1 after each of the ``3 * repeats`` runs.
    Returns:
        ``passages_per_s`` (``embed``, ``encode``, ``store``), ``bytes_per_passage``, ``sample``, ``embedder``,
        ``compressor``: JSON values.
    Raises:
        InputError: If there are no passages.
        ConfigError: If ``repeats`` is less than 1.
    """
    if not passages:
        raise InputError("The sample must hold passages, got none; give a file with text.")
    if repeats < 1:
        raise ConfigError(f"repeats must be 1 or more, got {repeats}.")
    texts = [passage.content for passage in passages]
    embedder.encode(texts[:8])
    compressor.encode(texts[:8])

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            result = run()
            times.append(time.perf_counter() - begin)
            advance(1)
        return len(texts) / median(times), result

    embed, vectors = timed(lambda: embedder.encode(texts))
    encode, made = timed(lambda: [memory.latents.numpy() for memory in compressor.encode(texts)])
    store, sizes = timed(lambda: _stored(passages, vectors, made, compressor))
    n, d = [len(memory) for memory in made], made[0].shape[1]
    forms = {form: round(float(np.mean([codec.size_bytes(form, k, d) for k in n])), 1) for form in codec.FORMS}
    words = [len(text.split()) for text in texts]
    return {
        "sample": {"passages": len(texts), "words": round(float(np.mean(words)), 1)},
        "embedder": {"name": embedder.name, "dimension": int(vectors.shape[1])},
        "compressor": {
            "fingerprint": compressor.fingerprint,
            "latents": round(float(np.mean(n)), 2),
            "width": d,
            "memory_form": compressor.memory_form,
            "latents_per_page": compressor.resampler_config.latents_per_page,
            "page_flops": page_flops(compressor.config.tower, compressor.resampler_config),
            "device": str(compressor.device),
            "dtype": str(compressor.dtype).removeprefix("torch."),
        },
        "passages_per_s": {"embed": round(embed, 2), "encode": round(encode, 2), "store": round(store, 2)},
        "bytes_per_passage": {"text": round(sizes.text_bytes / len(texts), 1), "memory": forms},
    }


def _stored(passages: Sequence[Passage], vectors: Any, memories: Sequence[Any], compressor: VistCompressor) -> Any:
    """Store a sample as :mod:`vist_rag.bulk` does, and say what it takes."""
    with (
        tempfile.TemporaryDirectory(prefix="vist-") as directory,
        PassageIndex.open(directory, embedder=GivenVectors("sample")) as index,
    ):
        form = compressor.memory_form
        index.add(passages, memories, vectors=vectors, fingerprint=compressor.fingerprint, form=form)
        return index.sizes()


def page_flops(tower: Any, resampler: Any) -> int:
    """FLOPs of one full page, from pixels to latents, counted without weights."""
    from vist_rag.evaluation.costs import TOKENS_PER_PAGE, count_costs
    from vist_rag.evaluation.paper_costs import shape

    page = int(Fraction(TOKENS_PER_PAGE))
    counted = count_costs(
        tower, shape("tinyllama-1.1b", "generator"), encoded_tokens=page, text_tokens=1, resampler=resampler
    )
    return sum(part.flops for part in counted.parts if part.name in ("tower", "resampler"))


def other_tower(rates: Mapping[str, Any], name: str, tower: Any, resampler: Any) -> dict[str, Any]:
    """Rates as they would be with another tower: its FLOPs at the speed, in FLOPs a second, of the one that was timed.

    Args:
        rates: Of :func:`measure_rates`.
        name: What the tower is called.
        tower: Config of the tower.
        resampler: Sizes of its resampler.
    """
    own = rates["compressor"]
    flops = page_flops(tower, resampler)
    latents, width = own["latents"] * resampler.latents_per_page / own["latents_per_page"], resampler.width
    encode = rates["passages_per_s"]["encode"] * own["page_flops"] / flops
    # As if all memories had the mean number of latents, whose bytes need not be whole.
    forms = {
        form: bits * latents * width / 8 + (0 if form == "float16" else 4 * width) for form, bits in codec.FORMS.items()
    }
    return {
        **rates,
        "compressor": {**own, "tower": name, "latents": latents, "width": width, "page_flops": flops},
        "passages_per_s": {**rates["passages_per_s"], "encode": encode},
        "bytes_per_passage": {**rates["bytes_per_passage"], "memory": forms},
    }


def read_rates(path: Path) -> dict[str, Any]:
    """Rates from a file of ``vist-rag costs --measure-rates``.

    Raises:
        InputError: If it cannot be read, or holds something else.
    """
    try:
        rates = json.loads(path.read_text("utf-8"))
        if rates["format"] != FORMAT:
            raise InputError(f"{path} must be of format {FORMAT}, got {rates['format']!r}; make it with this version.")
        table(rates, [1])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path.") from error
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not a file of rates ({type(error).__name__}: {error}); make one with vist-rag costs "
            "--measure-rates -o FILE."
        ) from error
    found: dict[str, Any] = rates
    return found


def parse_sizes(text: str) -> list[int]:
    """``1M,21M,1B`` -> numbers of passages; plain numbers, ``k``, ``M`` and ``B`` are understood.

    Raises:
        ConfigError: If it is something else, or less than 1.
    """
    factors = {"k": 10**3, "m": 10**6, "b": 10**9}
    sizes = []
    for part in (part.strip().lower().replace("_", "") for part in text.split(",")):
        number, factor = (part[:-1], factors[part[-1]]) if part[-1:] in factors else (part, 1)
        try:
            exact = Fraction(number) * factor
        except (ValueError, ZeroDivisionError):
            exact = Fraction(0)
        if exact < 1 or exact.denominator != 1:
            raise ConfigError(f"passages must be numbers of 1 or more, such as 1000,1M,21M,1B, got {text!r}.")
        sizes.append(int(exact))
    return sizes


def size_of(
    rates: Mapping[str, Any], passages: int, *, machines: int = 1, price_per_hour: float | None = None
) -> dict[str, Any]:
    """What so many passages take.

    Args:
        rates: Of :func:`measure_rates`.
        passages: How many.
        machines: How many machines like the measured one embed and encode; one of them stores.
        price_per_hour: Of one machine, in any currency.
    Returns:
        ``bytes``, ``hours`` (``embed`` and ``encode`` on all machines, ``store`` on one, ``total``), ``cost`` or None.
    Raises:
        ConfigError: If a number is out of range.
    """
    if machines < 1:
        raise ConfigError(f"machines must be 1 or more, got {machines}.")
    if price_per_hour is not None and price_per_hour < 0:
        raise ConfigError(f"price_per_hour must be 0 or more, got {price_per_hour}.")
    each, speed, dimension = rates["bytes_per_passage"], rates["passages_per_s"], rates["embedder"]["dimension"]
    hours = {name: passages / speed[name] / 3600 for name in ("embed", "encode", "store")}
    cost = None if price_per_hour is None else price_per_hour * sum(hours.values())
    hours |= {name: hours[name] / machines for name in ("embed", "encode")}
    return {
        "passages": passages,
        "bytes": {
            "text": passages * each["text"],
            "vectors": passages * 4 * dimension,
            "memory": {form: passages * size for form, size in each["memory"].items()},
            "faiss": {factory: faiss_bytes(factory, passages, dimension) for factory in FACTORIES},
        },
        "hours": {**hours, "total": sum(hours.values())},
        "cost": cost,
    }


def faiss_bytes(factory: str, n: int, d: int) -> int:
    """Bytes of a FAISS index of ``n`` vectors of length ``d``, beside what its hash map of row numbers takes.

    Args:
        factory: One of ``FACTORIES``.
        n: Vectors.
        d: Their length.
    """
    if factory == "Flat":
        return n * (4 * d + _ROW_BYTES)
    lists, code = (int(part.lstrip("IVFPQ")) for part in factory.split(","))
    return n * (code + _ROW_BYTES + _LISTED_BYTES) + 4 * d * (lists + 256)  # centroids of lists, and of codes


def table(
    rates: Mapping[str, Any], sizes: Sequence[int], *, machines: int = 1, price_per_hour: float | None = None
) -> str:
    """Sizes side by side as a Markdown table, and under it what was measured, when and where."""
    sized = [size_of(rates, size, machines=machines, price_per_hour=price_per_hour) for size in sizes]
    rows = [(name, [show(one) for one in sized], source) for name, show, source in _rows(rates, machines)]
    if price_per_hour is not None:
        costs = [f"{one['cost']:,.2f}" for one in sized]
        rows.append((f"cost at {price_per_hour:g} an hour", costs, "derived: hours of all machines"))
    lines = [["passages", *(f"{size:,}" for size in sizes), "from"], ["---", *("---:" for _ in sizes), "---"]]
    lines += [[name, *cells, source] for name, cells, source in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + _footnote(rates)


_Row = tuple[str, Callable[[Mapping[str, Any]], str], str]


def _rows(rates: Mapping[str, Any], machines: int) -> list[_Row]:
    each, speed, compressor = rates["bytes_per_passage"], rates["passages_per_s"], rates["compressor"]
    d, latents, width = rates["embedder"]["dimension"], compressor["latents"], compressor["width"]
    other = f"derived: FLOPs of {compressor['tower']}" if "tower" in compressor else "measured"

    def size(*path: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda one: _bytes(_at(one["bytes"], path))

    def hours(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda one: _hours(one["hours"][name])

    def memory(form: str) -> str:
        how = "derived" if "tower" in compressor else "measured"
        return f"{how}: {each['memory'][form]:,.0f} bytes, {latents:.1f} latents of {width}"

    forms = dict.fromkeys((compressor["memory_form"], "int8", "float16"))  # the first is what an index stores
    on = "1 machine" if machines == 1 else f"{machines} machines"
    return [
        ("text", size("text"), f"measured: {each['text']:,.0f} bytes a passage"),
        ("vectors, float32", size("vectors"), f"derived: 4 x {d} bytes"),
        *((f"memory, {form}", size("memory", form), memory(form)) for form in forms),
        *((f"FAISS {name}, RAM", size("faiss", name), "derived") for name in FACTORIES),
        (f"embed, {on}", hours("embed"), f"measured: {speed['embed']:,.1f} passages/s a machine"),
        (f"encode, {on}", hours("encode"), f"{other}: {speed['encode']:,.1f} passages/s a machine"),
        ("store, 1 machine", hours("store"), f"measured: {speed['store']:,.0f} passages/s"),
    ]


def _footnote(rates: Mapping[str, Any]) -> str:
    machine, sample = rates["machine"], rates["sample"]
    return (
        f"Measured {rates['date'][:10]} on {machine['device']} ({machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads), commit {str(rates['commit'])[:7]}, over {sample['passages']:,} passages of "
        f"{sample['words']:.0f} words: {rates['command']}"
    )


def _at(value: Any, path: Sequence[str]) -> float:
    for name in path:
        value = value[name]
    return float(value)


def _bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1e3:,.1f} kB"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min"
