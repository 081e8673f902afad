"""``vist-rag info``: versions, device, checkpoint, index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vist_rag.cli.models import load_parts, open_existing
from vist_rag.cli.terminal import JsonOption, ModelOption, command, emit_json, out, printable, working

if TYPE_CHECKING:
    from vist_rag.retrieval import PassageIndex


@command
def info(
    index: Annotated[Path | None, typer.Option("--index", metavar="DIR", help="Count what is in this index.")] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, the device, the checkpoint, and what an index holds."""
    with working("looking"):
        from vist_rag.evaluation.provenance import machine, versions

        report: dict[str, Any] = {"versions": versions(), "machine": machine()}
    report["checkpoint"] = _checkpoint(model)
    if index is not None:
        with open_existing(index) as opened:
            report["index"] = _index(index, opened, report["checkpoint"]["fingerprint"])
    if as_json:
        emit_json(report)
    else:
        _show(report)


def _checkpoint(model: str | None) -> dict[str, Any]:
    directory, settings, compressor, generator = load_parts(model)
    weights = {
        "vision_tower": compressor.tower,
        "resampler": compressor.resampler,
        "fusion": generator.fusion,
        "generator": generator.model,
    }
    return {
        "directory": str(directory),
        "fingerprint": compressor.fingerprint,
        "fusion": generator.fusion.kind,
        "bytes": {
            part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
            for part in sorted(directory.iterdir())
            if part.is_dir()
        },
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in weights.items()},
        "page": {
            "side_px": compressor.renderer_config.tower_size_px,
            "patch_px": compressor.renderer_config.patch_size_px,
            "latents": compressor.resampler_config.latents_per_page,
            "latent_width": compressor.resampler_config.memory_width,
            "glyphs": compressor.config.atlas["glyphs"],
        },
        "context_tokens": generator.context_tokens,
        "settings": settings,
    }


def _index(directory: Path, index: PassageIndex, fingerprint: str) -> dict[str, Any]:
    memories = index.fingerprints()
    return {
        "directory": str(directory),
        "passages": len(index),
        "embedder": index.meta.get("embedder"),
        "dimension": int(index.meta.get("dimension", 0)) or None,
        "index_factory": index.meta.get("index_factory"),
        "bytes": sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        "memories": memories,
        "memories_of_this_checkpoint": memories.get(fingerprint, 0),
        "read_only": index.read_only,
    }


def _show(report: dict[str, Any]) -> None:
    checkpoint = report["checkpoint"]
    table = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str]] = [
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("machine", ", ".join(f"{name} {value}" for name, value in report["machine"].items())),
        ("checkpoint", checkpoint["directory"]),
        ("  fingerprint", checkpoint["fingerprint"]),
        ("  fusion", checkpoint["fusion"].replace("_", " ")),
        ("  size", ", ".join(f"{part} {n / 1e6:.1f} MB" for part, n in checkpoint["bytes"].items())),
        ("  parameters", ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in checkpoint["parameters"].items())),
        ("  page", ", ".join(f"{name} {value}" for name, value in checkpoint["page"].items())),
        ("  context", f"{checkpoint['context_tokens']} tokens"),
        ("  budget", ", ".join(f"{k} {v}" for k, v in checkpoint["settings"].get("budget", {}).items()) or "default"),
    ]
    if "index" in report:
        index = report["index"]
        rows += [
            ("index", index["directory"] + (" (read-only)" if index["read_only"] else "")),
            ("  passages", f"{index['passages']:,}, {index['bytes'] / 1e6:.1f} MB"),
            ("  embedder", f"{index['embedder']}, {index['dimension']} wide, FAISS {index['index_factory']}"),
            ("  memories", f"{index['memories_of_this_checkpoint']:,} of this checkpoint"),
        ]
        rows += [
            ("", f"{n:,} of compressor {fingerprint[:12]}, not read")
            for fingerprint, n in index["memories"].items()
            if fingerprint != checkpoint["fingerprint"]
        ]
    for name, value in rows:
        table.add_row(name, printable(value))
    out.print(table, markup=False)
