"""How fast ``encode`` is, as a share of what its own matrix products take when nothing else is done.

    python benchmarks/encode.py --json

The passages of the demo corpus through the embedded compressor, and some of them through a tower of the shape of
ViT-L/14 with random weights, in float32 and bf16. The matrix products of one ``encode`` are written down as they
happen (shapes, dtype, how often; attention's two among them) and then run bare, on tensors that are there already, in
rounds that alternate with rounds of ``encode``. Time by part (render, tower, resampler, rest) comes from rounds of its
own. Blank patches in a batch count as products, so how many there are stands beside. The same script runs on a GPU
(``--device cuda``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vist_rag
from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.compression import VistCompressor
from vist_rag.config import ResamplerConfig
from vist_rag.evaluation.demo import demo_passages
from vist_rag.evaluation.provenance import run_facts
from vist_rag.rendering import GlyphAtlas

SHARE, RENDER_SHARE = 0.8, 0.05
"""What is asked for: of the rate of the bare products, at least; of the time of ``encode``, at most."""
VIT_L = {
    "model_type": "vit",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
}
Product = tuple[str, tuple[int, ...], torch.dtype]


class Products(TorchDispatchMode):
    """Writes down every matrix product that runs within it, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "linear":
            inputs, weight = args[:2]
            kind = "mm" if len(args) < 3 or args[2] is None else "addmm"
            self._add(kind, inputs, (inputs.shape[:-1].numel(), *reversed(weight.shape)))
        elif name == "addmm":
            self._add("addmm", args[1], (*args[1].shape, args[2].shape[1]))
        elif name in ("mm", "bmm"):
            self._add(name, args[0], (*args[0].shape, args[1].shape[-1]))
        elif "scaled_dot_product" in name:
            (b, h, t, d), s = args[0].shape, args[1].shape[2]
            self._add("bmm", args[0], (b * h, t, d, s))
            self._add("bmm", args[0], (b * h, t, s, d))
        elif name in ("conv2d", "convolution"):  # that of the patches, which do not overlap
            width, *patch = args[1].shape
            patches = args[0].shape[0] * args[0][0, 0].numel() // (patch[1] * patch[2])
            self._add("addmm", args[0], (patches, patch[0] * patch[1] * patch[2], width))
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, like: Tensor, shape: tuple[int, ...]) -> None:
        self.counts[kind, shape, like.dtype] += 1


def flops(counts: Counter[Product]) -> int:
    """Operations of all products: two for each multiplication."""
    return sum(2 * int(np.prod(shape, dtype=np.int64)) * n for (_, shape, _), n in counts.items())


def bare(counts: Counter[Product], device: torch.device) -> Callable[[], None]:
    """The products alone, on tensors that are allocated now; a layer's weights stand as ``nn.Linear`` keeps them."""
    made: list[tuple[Callable[..., Any], tuple[Tensor, ...], Tensor, int]] = []
    for (name, shape, dtype), n in counts.items():
        *batch, m, k, out = shape
        left = torch.randn(*batch, m, k, device=device, dtype=dtype)
        right = torch.randn(*batch, out, k, device=device, dtype=dtype).transpose(-1, -2)
        held = torch.empty(*batch, m, out, device=device, dtype=dtype)
        inputs = (torch.randn(out, device=device, dtype=dtype), left, right) if name == "addmm" else (left, right)
        made.append((getattr(torch, name), inputs, held, n))

    def run() -> None:
        for product, inputs, held, n in made:
            for _ in range(n):
                product(*inputs, out=held)

    return run


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, up to the end of what it started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@contextmanager
def timed_parts(compressor: VistCompressor, taken: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds of render, tower and resampler while it is open."""
    device = compressor.device

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result: list[Any] = []
            taken[name] += seconds(lambda: result.append(work(*args, **kwargs)), device)
            return result[0]

        return call

    renderer, tower, resampler = compressor.renderer, compressor.tower, compressor.resampler
    holders: tuple[tuple[str, Any, str], ...] = (
        ("render", renderer, "render"),
        ("tower", tower, "forward"),
        ("resampler", resampler, "forward"),
    )
    for name, holder, method in holders:
        setattr(holder, method, timed(name, getattr(holder, method)))
    try:
        yield
    finally:
        for _, holder, method in holders:
            delattr(holder, method)


@torch.inference_mode()
def measure(compressor: VistCompressor, texts: Sequence[str], rounds: int, parts_rounds: int) -> dict[str, Any]:
    """Rates, shares and parts of one compressor."""
    device, pages = compressor.device, compressor.renderer.render(texts)
    with Products() as products:
        compressor.encode(texts)
    run = bare(products.counts, device)
    encode_s, bare_s = [], []
    for warm in [True, *[False] * rounds]:
        taken = seconds(lambda: compressor.encode(texts), device), seconds(run, device)
        if not warm:
            encode_s.append(taken[0])
            bare_s.append(taken[1])
    parts: dict[str, list[float]] = {name: [] for name in ("render", "tower", "resampler", "rest")}
    for _ in range(parts_rounds):
        took = dict.fromkeys(("render", "tower", "resampler"), 0.0)
        with timed_parts(compressor, took):
            whole = seconds(lambda: compressor.encode(texts), device)
        for name, value in {**took, "rest": whole - sum(took.values())}.items():
            parts[name].append(value / whole)
    flop = flops(products.counts)
    held = int(pages.patch_mask.sum())
    width = compressor.resampler.feature_width  # type: ignore[union-attr]
    into = compressor.resampler_config.width
    # Once a pass: the layer that every patch goes through on its way into the resampler.
    computed = sum(s[0] * n for (_, s, _), n in products.counts.items() if s[1:] == (width, into))
    share = np.array(bare_s) / np.array(encode_s)
    render = median_95(np.array(parts["render"]))
    return {
        "dtype": str(compressor.dtype).removeprefix("torch."),
        "passages": len(texts),
        "pages": len(pages),
        "patches_of_text": held,
        "patches_computed": computed,
        "rounds": rounds,
        "passages_per_s": median_95(len(texts) / np.array(encode_s)),
        "bare_products_passages_per_s": median_95(len(texts) / np.array(bare_s)),
        "gflop": round(flop / 1e9, 1),
        "bare_gflops": round(flop / float(np.median(bare_s)) / 1e9, 1),
        "share_of_bare": {**median_95(share), "at_least": SHARE, "kept": bool(np.median(share) >= SHARE)},
        "render_share": {**render, "at_most": RENDER_SHARE, "kept": render["median"] <= RENDER_SHARE},
        "parts": {name: round(float(np.median(values)), 4) for name, values in parts.items()},
    }


def median_95(values: np.ndarray) -> dict[str, Any]:
    """The median, with its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return {"median": round(float(np.median(values)), 4), "95": [round(float(low), 4), round(float(high), 4)]}


def vit_l(dtype: torch.dtype, device: str) -> VistCompressor:
    """A compressor around a tower of the shape of ViT-L/14, its weights random."""
    torch.manual_seed(0)
    atlas = GlyphAtlas.load(Path(vist_rag.__file__).parent / "assets" / "noto-sans-10px.safetensors")
    sizes = ResamplerConfig(latents_per_page=64, width=1024, heads=16, layers=2)
    return VistCompressor.build(VIT_L, atlas, resampler=sizes).eval().to(device, dtype)


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, help="of the demo corpus, for the embedded compressor; all if left out")
    parser.add_argument(
        "--large-passages", type=int, default=16, help="for the tower of the shape of ViT-L/14; 0: none"
    )
    parser.add_argument("--rounds", type=int, default=10, help="alternating rounds (10; 3 of the large tower)")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    texts = [passage.content for passage in demo_passages()]
    own = load_compressor(find_checkpoint(None), device=arguments.device)
    found = {"embedded": measure(own, texts[: arguments.passages], arguments.rounds, parts_rounds=3)}
    some = texts[: arguments.large_passages]
    for dtype in (torch.float32, torch.bfloat16) if some else ():
        large = vit_l(dtype, arguments.device)
        found[f"vit-l-14 {dtype}".replace("torch.", "")] = measure(
            large, some, min(3, arguments.rounds), parts_rounds=1
        )
    result = {
        "benchmark": "encode",
        **run_facts(" ".join(["python benchmarks/encode.py", *sys.argv[1:]])),
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "measured": found,
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
        return
    for name, one in found.items():
        share, render = one["share_of_bare"], one["render_share"]
        print(f"{name}: {one['passages_per_s']['median']} passages a second, {one['parts']}")
        print(f"  {share['median']:.0%} {share['95']} of the bare products' rate (limit {SHARE:.0%})")
        print(f"  rendering: {render['median']:.1%} of the time (limit {RENDER_SHARE:.0%})")


if __name__ == "__main__":
    main()
