"""The input embeddings of a causal LM without the rest of it: what it takes to write prompts for a model elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vist_rag.errors import CheckpointError, ConfigError, VistError
from vist_rag.generation.int8 import is_int8
from vist_rag.generation.referenced import REFERENCE_FILE, is_referenced
from vist_rag.references import Reference, resolve

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class InputEmbeddings(nn.Module):
    """Token ids to ``inputs_embeds``, as one model does it: its table, and its scale where it has one (Gemma).

    Args:
        table: The model's own layer: int64 ``[...]`` -> float ``[..., d_llm]``.
        config: The model's.
    """

    def __init__(self, table: nn.Embedding, config: PreTrainedConfig) -> None:
        super().__init__()
        self.table = table
        self.config = config
        self.generation_config = None

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> InputEmbeddings:
        """Read the one tensor that is needed; of a model on the hub, only the file that holds it is downloaded.

        Args:
            model: Hub id or local directory of a causal LM, or a checkpoint's directory that refers to one.
            device: Where the table is put.
            dtype: None: as it is stored.
        Raises:
            CheckpointError: If it is missing, torn, or of another shape than the config says.
            ConfigError: If the model reads more of a prompt than embeddings, or is stored in a form of this package.
        """
        source = _source(model)
        try:
            config = AutoConfig.from_pretrained(str(source.config))
            # Only the layer's class and its name are wanted: no weight is made.
            with torch.device("meta"):
                skeleton = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
            table = _layer(skeleton)
            if is_int8(source.weights):
                raise ConfigError(
                    f"model must be stored in a dtype that servers read, got {source.weights} with int8 rows, a form "
                    "of this package; store the checkpoint with int8=False, or refer to the model (generator_base)."
                )
            weight = _read(source, skeleton, table)
        except VistError:
            raise
        except Exception as error:  # torn files, bad JSON and unknown architectures each raise a class of their own
            raise CheckpointError(f"embeddings of {model} cannot be loaded ({error}); restore its files.") from error
        table.weight = nn.Parameter(weight.to(device, dtype or weight.dtype), requires_grad=False)
        return cls(table.to(device), config)

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.table.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        """As of a model."""
        return self.table


class _Source(NamedTuple):
    config: str | Path
    weights: str | Path
    revision: str | None

    def file(self, name: str) -> Path | None:
        """A file beside the weights, downloaded where it is on the hub; None where there is none, or no connection."""
        if Path(self.weights).is_dir():
            path = Path(self.weights) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(str(self.weights), name, revision=self.revision))
        except EntryNotFoundError:
            return None


def _source(model: str | Path) -> _Source:
    if not is_referenced(model):
        return _Source(resolve(model, weights=False), model, None)
    path = Path(model) / REFERENCE_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it.") from error
    # The hash of the whole model is not checked: it is the server that loads the whole model.
    reference = Reference.read(fields, path)
    return _Source(model, reference.id, reference.revision)


def served_name(model: str | Path) -> str:
    """What a server calls a model that it was started with: its id, or that of the one that a checkpoint refers to."""
    return str(_source(model).weights)


def _layer(skeleton: PreTrainedModel) -> nn.Embedding:
    """A model's input embeddings, whole but for the weight."""
    if "shown" in signature(skeleton.forward).parameters:
        raise ConfigError(
            f"model must read embeddings only to be served elsewhere, got a {type(skeleton).__name__}, which is told "
            "the words of a memory beside them; load it here, with VistGenerator."
        )
    table = cast(nn.Embedding, skeleton.get_input_embeddings())
    # What is not stored, such as Gemma's scale, is made by the model's own code.
    for name, buffer in list(table.named_buffers(recurse=False)):
        table.register_buffer(name, torch.full_like(buffer, torch.nan, device="cpu"), persistent=False)
    skeleton._init_weights(table)
    if any(buffer.isnan().any() for buffer in table.buffers()):
        raise ConfigError(
            f"model must be one whose input embeddings can be built alone, got a {type(skeleton).__name__}; load it "
            "here, with VistGenerator."
        )
    return table


def _read(source: _Source, skeleton: PreTrainedModel, table: nn.Embedding) -> Tensor:
    if whole := source.file(_WHOLE):
        with safe_open(str(whole), framework="pt") as file:
            files = dict.fromkeys(file.keys(), _WHOLE)
    elif index := source.file(_INDEX):
        files = json.loads(index.read_text("utf-8"))["weight_map"]
    else:
        raise _no_file(source, _WHOLE)
    key = _key(list(files), skeleton, table, source.weights)
    path = source.file(files[key])
    if path is None:
        raise _no_file(source, files[key])
    with safe_open(str(path), framework="pt") as file:
        weight: Tensor = file.get_tensor(key)
    if weight.shape != table.weight.shape or not weight.is_floating_point():
        raise CheckpointError(
            f"{key} of {source.weights} must be float {list(table.weight.shape)} (as its config says), got "
            f"{weight.dtype} {list(weight.shape)}; restore its files."
        )
    return weight


def _no_file(source: _Source, name: str) -> CheckpointError:
    return CheckpointError(
        f"model {source.weights} must hold its weights as safetensors, got no {name} (pickle is not read, as it can "
        "run code); restore it, connect to the hub, or write it with save_pretrained."
    )


def _key(stored: Sequence[str], skeleton: PreTrainedModel, table: nn.Embedding, model: str | Path) -> str:
    """The name under which the table is stored: its own, with another prefix, or that of the tied output."""
    names: dict[Any, str] = {module: name for name, module in cast(Any, skeleton).named_modules()}
    own = f"{names[table]}.weight"
    last = ".".join(own.split(".")[-2:])
    tied = [f"{names[out]}.weight" for out in (skeleton.get_output_embeddings(),) if out in names]
    same = [name for name in stored if name == last or name.endswith(f".{last}")]
    found: list[str] = [name for name in (own, *(same if len(same) == 1 else ()), *tied) if name in stored]
    if not found:
        raise CheckpointError(f"model {model} must hold its input embeddings as {own}, got none; restore its files.")
    return found[0]
