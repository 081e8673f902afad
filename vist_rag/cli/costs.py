"""``vist-rag costs``: FLOPs and bytes of a pair of models, the paper's Table 1 beside ours, latency of a checkpoint."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vist_rag.cli.models import load_parts
from vist_rag.cli.sizing import measure as measured_rates
from vist_rag.cli.sizing import show_sizes, write_rates
from vist_rag.cli.terminal import JsonOption, ModelOption, command, emit_json, out, printable, progress, say, working
from vist_rag.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vist_rag.config import FusionConfig, ResamplerConfig

_PAPER_TOKENS = 2048
_CONTEXT = 2  # a generator with a small context reads half of it as text, and encodes as many tokens


@command
def costs(
    tower: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR|HUB_ID",
            help="Encoder: vit-l-14, roberta-large, or a config of a vision tower or a text encoder.",
            show_default="the checkpoint's",
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR|HUB_ID",
            help="Generator: tinyllama-1.1b, or a config of a causal language model.",
            show_default="the checkpoint's",
        ),
    ] = None,
    model: ModelOption = None,
    fusion: Annotated[str, typer.Option(metavar="soft_prompt|cross_attention", help="How memory enters.")] = (
        "soft_prompt"
    ),
    encoded_tokens: Annotated[
        int | None,
        typer.Option(
            "--encoded-tokens", metavar="N", help="Tokens read as memory.", show_default="2048, or half the context"
        ),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            "--text-tokens", metavar="N", help="Tokens read as text.", show_default="2048, or half the context"
        ),
    ] = None,
    latents: Annotated[
        int | None, typer.Option(metavar="N", help="Latents a page.", show_default="the checkpoint's, or 64")
    ] = None,
    passage_tokens: Annotated[
        int | None,
        typer.Option(
            "--passage-tokens",
            metavar="N",
            help="Tokens of a passage; each has pages of its own.",
            show_default="all in one",
        ),
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Keep attention scores, instead of fused attention.")] = False,
    paper: Annotated[bool, typer.Option("--paper", help="Table 1 of the paper beside our count.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time the checkpoint on this machine instead.")] = False,
    repeats: Annotated[int, typer.Option(metavar="N", help="For --measure: timed runs.")] = 20,
    k: Annotated[
        str, typer.Option("--k", metavar="N,N,...", help="For --measure: passages that are read, one count or several.")
    ] = "2",
    words: Annotated[int, typer.Option(metavar="N", help="For --measure, --data: words of each passage.")] = 100,
    passages: Annotated[
        str | None,
        typer.Option("--passages", metavar="N,N,...", help="Bytes and hours of corpora instead, such as 1M,21M,1B."),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For --passages: of --measure-rates.", show_default="measured now, here"),
    ] = None,
    machines: Annotated[int, typer.Option(metavar="N", help="For --passages: like the one that was measured.")] = 1,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="X", help="For --passages: of one machine, in any currency.")
    ] = None,
    measure_rates: Annotated[
        bool, typer.Option("--measure-rates", help="Measure passages a second and bytes a passage on this machine.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="For measured rates: a sample of your corpus.", show_default="the demo's"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="For --measure-rates: where to write them.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count what a prompt costs, without weights or GPU: FLOPs and bytes of each part.

    What is not given is taken from the checkpoint. With --paper, Table 1 of the paper is counted again; with --measure,
    the checkpoint is run and timed. With --passages, what whole corpora take: bytes, hours, cost.
    """
    modes = {
        "--paper": paper, "--measure": measure, "--measure-rates": measure_rates, "--passages": passages is not None
    }  # fmt: skip
    if len(asked := [name for name, wanted in modes.items() if wanted]) > 1:
        raise ConfigError(f"{' and '.join(asked)} must not be given together; leave one out.")
    if paper:
        _paper(as_json=as_json)
    elif measure_rates:
        write_rates(measured_rates(model, data, words), output, as_json=as_json)
    elif passages is not None:
        show_sizes(
            passages,
            lambda: _rates(rates, model, data, words, tower, latents),
            machines,
            price_per_hour,
            as_json=as_json,
        )
    elif measure:
        _measure(model, repeats, k, words, as_json=as_json)
    else:
        sizes = {"encoded_tokens": encoded_tokens, "text_tokens": text_tokens, "passage_tokens": passage_tokens}
        _count(tower, generator, model, latents, sizes, fusion=fusion, eager=eager, as_json=as_json)


def _rates(
    rates: Path | None, model: str | None, data: Path | None, words: int, tower: str | None, latents: int | None
) -> dict[str, Any]:
    from vist_rag.evaluation.paper_costs import shape
    from vist_rag.evaluation.sizing import other_tower, read_rates

    found = measured_rates(model, data, words) if rates is None else read_rates(rates)
    if tower is None:
        return found
    encoder = shape(tower, "--tower")
    return other_tower(found, tower, encoder, _resampler(encoder, latents))


# ----------------------------------------------------------------------------------------------------------- counting


def _count(
    tower: str | None,
    generator: str | None,
    model: str | None,
    latents: int | None,
    sizes: dict[str, int | None],
    *,
    fusion: str,
    eager: bool,
    as_json: bool,
) -> None:
    with working("counting"):
        from vist_rag.evaluation.costs import count_costs, learned_positions
        from vist_rag.evaluation.paper_costs import shape

        own = None if tower and generator else _Checkpoint(model)
        llm = shape(generator, "--generator") if generator else _given(own).generator
        encoder: Any = shape(tower, "--tower") if tower else _given(own).tower
        resampler = _resampler(encoder, latents) if tower else _given(own).resampler(latents)
        limit = learned_positions(llm)
        default = _PAPER_TOKENS if limit is None else min(_PAPER_TOKENS, limit // _CONTEXT)
        encoded, text = (default if sizes[n] is None else sizes[n] for n in ("encoded_tokens", "text_tokens"))
        counted = count_costs(
            encoder,
            llm,
            encoded_tokens=encoded or 0,
            text_tokens=text or 0,
            passage_tokens=sizes["passage_tokens"],
            resampler=resampler,
            fusion=fusion,
            projector=None if tower or generator else _given(own).fusion,
            attention="eager" if eager else "fused",
        )
    context = getattr(llm.get_text_config(), "max_position_embeddings", None)
    if context and counted.positions > context:
        say(f"note: {counted.positions:,} positions are more than the {context:,} of this generator.", style="yellow")
    report = {"tower": tower or "checkpoint", "generator": generator or "checkpoint", **counted.to_dict()}
    if as_json:
        emit_json(report)
    else:
        _show_count(report)


class _Checkpoint:
    """The configs of a checkpoint; its weights stay on disk."""

    def __init__(self, model: str | None) -> None:
        from transformers import AutoConfig

        from vist_rag.checkpoint import find_checkpoint
        from vist_rag.compression import VistConfig
        from vist_rag.config import FusionConfig

        directory = find_checkpoint(model)
        try:
            compressor = AutoConfig.from_pretrained(directory / "compressor")
            if not isinstance(compressor, VistConfig):
                raise CheckpointError(
                    f"--model must hold a compressor that reads pictures, got {compressor.model_type}; give --tower."
                )
            self.tower: dict[str, Any] = dict(compressor.tower or {})
            self._resampler: dict[str, Any] = dict(compressor.resampler or {})
            self.generator: PreTrainedConfig = AutoConfig.from_pretrained(directory / "generator")
            fields = json.loads((directory / "fusion" / "config.json").read_text("utf-8"))
            fields.pop("fusion", None)
            self.fusion: FusionConfig = FusionConfig(**fields)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"configs of {directory} cannot be read ({error}); restore its files.") from error

    def resampler(self, latents: int | None) -> ResamplerConfig:
        from vist_rag.config import ResamplerConfig

        return ResamplerConfig(**self._resampler | ({} if latents is None else {"latents_per_page": latents}))


def _given(checkpoint: _Checkpoint | None) -> _Checkpoint:
    if checkpoint is None:
        raise ConfigError("--model must be given where --tower or --generator is not, got neither.")
    return checkpoint


def _resampler(encoder: PreTrainedConfig, latents: int | None) -> ResamplerConfig:
    """For a tower without a checkpoint: as wide as the tower, heads of 64."""
    from vist_rag.config import ResamplerConfig

    vision = getattr(encoder, "vision_config", encoder)
    width = int(vision.hidden_size)
    heads = width // 64 if width % 64 == 0 else 1
    return ResamplerConfig(latents_per_page=64 if latents is None else latents, width=width, heads=heads)


def _show_count(report: dict[str, Any]) -> None:
    table = Table(
        "part",
        box=SIMPLE_HEAD,
        title=f"{report['encoded_tokens']:,} tokens as memory, {report['text_tokens']:,} as text",
    )
    for name in ("GFLOPs", "of them scores", "weights, MB", "activations, MB"):
        table.add_column(name, justify="right")
    for part in report["parts"]:
        figures = (part["flops"] / 1e9, part["score_flops"] / 1e9, part["weight_bytes"] / 1e6)
        table.add_row(part["name"], *(f"{n:,.2f}" for n in figures), f"{part['activation_bytes'] / 1e6:,.1f}")
    scores = sum(part["score_flops"] for part in report["parts"])
    totals = (report["flops"] / 1e9, scores / 1e9, report["weight_bytes"] / 1e6)
    table.add_row("all", *(f"{n:,.2f}" for n in totals), f"{report['activation_bytes'] / 1e6:,.1f} peak", style="bold")
    out.print(table)
    rows = (
        ("with memory kept ready", f"{report['stored_flops'] / 1e9:,.2f} GFLOPs to the first token"),
        ("each further token", f"{report['decode_flops'] / 1e9:,.3f} GFLOPs"),
        ("pages, memory entries", f"{report['pages']:,}, {report['memory_entries']:,}"),
        ("positions of the prompt", f"{report['positions']:,}"),
        ("keys and values", f"{report['kv_bytes'] / 1e6:,.2f} MB"),
        ("a passage, kept as memory", f"{report['memory_bytes_per_passage'] / 1e3:,.1f} kB"),
        ("a passage, its keys and values as text", f"{report['raw_kv_bytes_per_passage'] / 1e3:,.1f} kB"),
        ("weights + keys and values + peak", f"{report['total_bytes'] / 1e9:,.3f} GB"),
    )
    _show_rows(rows)


# ---------------------------------------------------------------------------------------------------------- the paper


def _paper(*, as_json: bool) -> None:
    with working("loading"):
        from vist_rag.evaluation.paper_costs import MEMORY_REASON, REASONS, TABLE_1, compare_with_paper
    with progress("counting the rows of Table 1", len(TABLE_1)) as advance:
        rows = compare_with_paper(advance)
    if as_json:
        emit_json({"rows": rows, "reasons": REASONS, "memory": MEMORY_REASON})
        return
    flops = Table("method", box=SIMPLE_HEAD, title="Table 1 of arXiv:2502.00791, TFLOPs of a forward pass")
    for name in ("encoded", "text", "paper", "ours", "", "reconciled", ""):
        flops.add_column(name, justify="right")
    memory = Table("method", box=SIMPLE_HEAD, title="Table 1, gigabytes (ours: weights, keys and values, peak)")
    for name in ("encoded", "text", "paper", "ours", "", "weights", "KV", "peak"):
        memory.add_column(name, justify="right")
    for row in rows:
        which = (row["method"], f"{row['encoded_tokens']:,}", f"{row['text_tokens']:,}")
        ours = (f"{row['ours_tflops']:.2f}", f"{row['ours_percent']:+.1f} %")
        reconciled = (f"{row['reconciled_tflops']:.2f}", f"{row['reconciled_percent']:+.1f} %")
        flops.add_row(*which, f"{row['paper_tflops']:.2f}", *ours, *reconciled)
        parts = (f"{row[name]:.2f}" for name in ("weights_gb", "kv_gb", "activations_gb"))
        memory.add_row(
            *which, f"{row['paper_gb']:.2f}", f"{row['ours_gb']:.2f}", f"{row['ours_gb_percent']:+.0f} %", *parts
        )
    out.print(flops)
    out.print("Reconciled: ours without what, by inference, the paper's counter did not see.")
    for method, reason in REASONS.items():
        out.print(f"  {method}: {reason}", markup=False)
    out.print(memory)
    out.print(MEMORY_REASON, markup=False)


# ---------------------------------------------------------------------------------------------------------- measuring


def _measure(model: str | None, repeats: int, k: str, words: int, *, as_json: bool) -> None:
    with working("loading"):
        from vist_rag.evaluation.latency import FORMAT, WARM_UP, measure_latency, points_of, sample_passages
        from vist_rag.evaluation.provenance import run_facts
        from vist_rag.generation import PromptTemplate

        if repeats < 1:
            raise ConfigError(f"--repeats must be 1 or more, got {repeats}.")
        counts = [part.strip() for part in k.split(",")]
        if not all(count.isdecimal() and int(count) > 0 for count in counts):
            raise ConfigError(f"--k must be numbers of 1 or more, separated by commas, got {k!r}.")
        ks = sorted({int(count) for count in counts})
        passages = sample_passages(ks[-1], words)
    directory, settings, compressor, generator = load_parts(model)
    try:
        template = PromptTemplate(**settings.get("template", {}))
    except TypeError as error:
        raise CheckpointError(f"template of {directory} is not of this version ({error}); restore it.") from error
    with progress("timing", (WARM_UP + repeats) * len(ks)) as advance:
        reports = [
            measure_latency(
                compressor, generator, template, passages=passages, k=count, repeats=repeats, advance=advance
            )
            for count in ks
        ]
    if as_json:
        facts = run_facts(shlex.join(["vist-rag", *sys.argv[1:]]))
        emit_json({"format": FORMAT, **facts, "words": words, "points": points_of(reports), "measured": reports})
        return
    for report in reports:
        _show_latency({"words": words, **report})


def _show_latency(report: dict[str, Any]) -> None:
    title = f"{report['passages']} passages of {report['words']} words, {report['device']}, {report['dtype']}"
    table = Table("milliseconds", box=SIMPLE_HEAD, title=title)
    for name in ("median", "25 %", "75 %"):
        table.add_column(name, justify="right")
    names = {"fusion": "fusion (reads memory)", "decode": "each decoded token"}
    for name, ms in report["stages_ms"].items():
        table.add_row(names.get(name, name), *(f"{ms[q]:.2f}" for q in ("median", "q25", "q75")))
    table.add_section()
    for name, ms in report["first_token_ms"].items():
        cells = ("does not fit",) if ms is None else tuple(f"{ms[q]:.2f}" for q in ("median", "q25", "q75"))
        table.add_row(f"first token, {name.replace('_', ' ')}", *cells)
    out.print(table)
    peak = report["peak_memory"]
    rows = [
        ("tokens of the passages", f"{report['origin_tokens']:,} as text, {report['latents']:,} latents"),
        ("positions of the prompt", f"{report['prompt_tokens']['raw']:,} raw, {report['prompt_tokens']['memory']:,}"),
        *(
            (f"throughput, {name.replace('_', ' ')}", "does not fit" if rate is None else f"{rate:,.0f} input tokens/s")
            for name, rate in report["throughput_tokens_per_s"].items()
        ),
        ("peak memory", (f"{peak['bytes'] / 1e6:,.0f} MB: " if peak["bytes"] else "") + peak["of"]),
    ]
    _show_rows(rows)


def _show_rows(rows: Any) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, printable(value))
    out.print(table)
