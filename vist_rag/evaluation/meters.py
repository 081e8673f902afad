"""Run a module on tensors without storage, and count its FLOPs and the bytes that are live at one time."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vist_rag.compression.vision import VisionTower

_IN_ATTENTION = re.compile(r"attn|attention|\.blocks\.\d+\.(query|key_value|output)$", re.IGNORECASE)
_SCORES = re.compile(r"bmm|scaled_dot_product|_attention_")


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the way from text to answer costs, for one prompt.

    Attributes:
        name: ``rendering``, ``tower`` or ``text_encoder``, ``resampler``, ``projector`` or ``cross_attention``,
            ``llm``.
        flops: Floating-point operations of its matrix products and convolutions; multiplying and adding are two.
        score_flops: Those among them that are products of two activations: attention scores and what they weigh.
        attention_linear_flops: Those among them of the linear layers of attention: queries, keys, values, output.
        weight_bytes: Of its parameters, each once.
        activation_bytes: The most that its tensors hold at one time, its input and output included, weights not.
    """

    name: str
    flops: int
    score_flops: int = 0
    attention_linear_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Counted:
    """What a function returned, and what it took."""

    result: Any
    flops: int
    score_flops: int
    attention_linear_flops: int
    activation_bytes: int
    weight_bytes: int

    def part(self, name: str, times: int = 1) -> Part:
        """The same as a part; ``times`` such blocks run one after the other."""
        return Part(
            name,
            times * self.flops,
            times * self.score_flops,
            times * self.attention_linear_flops,
            times * self.weight_bytes,
            self.activation_bytes,
        )


class LiveBytes(TorchDispatchMode):
    """Follows the storages of tensors that come into being under it, from the first tensor to the last.

    Args:
        weights: Modules whose parameters and buffers are not counted: they were there before.
        value: What a tensor without values answers when asked for one.

    Attributes:
        live: Bytes now.
        peak: The most that were live at one time, between two operations.
    """

    def __init__(self, *weights: nn.Module, value: int = 0) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._value = value
        self._known = {_key(t) for module in weights for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._value  # the one number that a tower asks of its mask: how many patches hold text
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._known:
                self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as one operation that keeps no scores; on ``meta`` PyTorch would take it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


class _EagerAttention(TorchFunctionMode):
    """Softmax of fp16 scores into float32 in one operation, as on CUDA; on ``meta`` PyTorch would copy them first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.softmax and args[0].dtype is torch.float16 and given.get("dtype") is torch.float32:
            return torch.ops.aten._softmax(args[0], given.get("dim", -1), True)
        return func(*args, **given)


def run(function: Callable[[], Any], module: nn.Module, *, attention: str, value: int = 0) -> Counted:
    """Run a function on ``meta`` tensors, and count. What it allocates itself is among its activations.

    Args:
        function: Calls ``module``, which :func:`on_meta` built.
        module: Its weights are no activations.
        attention: ``fused`` or ``eager``.
        value: What a tensor answers when it is asked for a value.
    """
    flops, memory = FlopCounterMode(display=False), LiveBytes(module, value=value)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # Where a size depends on values, such as how many words a position shows: the largest there can be.
        stack.enter_context(fx_config.patch(meta_nonzero_assume_all_nonzero=True))  # type: ignore[attr-defined]
        stack.enter_context(flops)
        stack.enter_context(memory)
        stack.enter_context(_FusedAttention() if attention == "fused" else _EagerAttention())
        result = function()
    counts = {
        name: {str(op).rpartition(".")[2]: n for op, n in ops.items()} for name, ops in flops.get_flop_counts().items()
    }
    total = counts.get("Global", {})
    within = {name.rpartition(".")[0] for name in counts}
    leaves = [name for name in counts if name not in within and _IN_ATTENTION.search(name)]
    return Counted(
        result,
        sum(total.values()),
        sum(n for op, n in total.items() if _SCORES.search(op)),
        sum(n for name in leaves for op, n in counts[name].items() if not _SCORES.search(op)),
        memory.peak,
        sum(p.numel() * p.element_size() for p in module.parameters()),
    )


def on_meta(build: Callable[[], Any], attention: str, dtype: torch.dtype) -> Any:
    """What ``build`` makes, without storage, for inference; ``eager`` attention is set where a model has a choice."""
    with torch.device("meta"):
        module: Any = build().to(dtype).eval()
    model: Any = module.model if isinstance(module, VisionTower) else module
    if attention == "eager" and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return module


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that has a shape only."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
