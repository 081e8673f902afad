from __future__ import annotations

import copy
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaPreTrainedModel

from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.generation.embeddings import InputEmbeddings, served_name
from vist_rag.generation.int8 import save_int8
from vist_rag.generation.prefix_bert import PrefixBertConfig
from vist_rag.generation.referenced import check_generator, save_referenced
from vist_rag.references import Reference

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma": GemmaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),
}
IDS = torch.tensor([[1, 2, 39, 0]])


def model(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))


@pytest.mark.parametrize("family", CONFIGS)
def test_ids_become_what_the_model_makes_of_them(family: str, tmp_path: Path) -> None:
    whole = model(family)
    whole.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    read = InputEmbeddings.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(read.get_input_embeddings()(IDS), whole.get_input_embeddings()(IDS))
    scale = 4.0 if "gemma" in family else 1.0  # the root of the width
    assert torch.equal(read.get_input_embeddings()(IDS), whole.get_input_embeddings().weight[IDS] * scale)
    assert sum(weight.numel() for weight in read.parameters()) == 40 * 16


def test_one_file_of_many_is_read(tmp_path: Path) -> None:
    whole = model()
    whole.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    holds = index["model.embed_tokens.weight"]
    for file in tmp_path.glob("*.safetensors"):
        if file.name != holds:
            file.unlink()
    assert len(set(index.values())) > 3
    assert torch.equal(InputEmbeddings.from_pretrained(tmp_path).table.weight, whole.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "embed_tokens.weight"), ("llama", "language_model.embed_tokens.weight"), ("tied", "lm_head.weight")],
)
def test_the_table_is_found_under_other_names(family: str, name: str, tmp_path: Path) -> None:
    whole = model(family)
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[name] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors")
    assert torch.equal(InputEmbeddings.from_pretrained(tmp_path).table.weight, whole.get_input_embeddings().weight)


def test_the_dtype_is_that_of_the_file(tmp_path: Path) -> None:
    model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert InputEmbeddings.from_pretrained(tmp_path).table.weight.dtype == torch.bfloat16
    assert InputEmbeddings.from_pretrained(tmp_path, dtype=torch.float32).table.weight.dtype == torch.float32


def test_of_a_model_on_the_hub_one_file_of_weights_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = model(), []
    whole.save_pretrained(tmp_path, max_shard_size="4KB")

    def download(model: str, name: str, *, revision: str | None) -> str:
        assert (model, revision) == ("someone/model", None)
        asked.append(name)
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    def snapshot(model: str, *, allow_patterns: list[str], **_: object) -> str:
        assert "*.safetensors" not in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    read = InputEmbeddings.from_pretrained("someone/model")
    assert torch.equal(read.table.weight, whole.get_input_embeddings().weight)
    assert asked[:2] == ["model.safetensors", "model.safetensors.index.json"]
    assert len(asked) == 3


def test_of_a_checkpoint_that_refers_to_its_generator(tmp_path: Path) -> None:
    whole = model()
    whole.save_pretrained(tmp_path / "base")
    reference = check_generator(whole, Reference.of(str(tmp_path / "base")))
    save_referenced(whole, reference, tmp_path / "generator")
    read = InputEmbeddings.from_pretrained(tmp_path / "generator")
    assert torch.equal(read.table.weight, whole.get_input_embeddings().weight)
    assert served_name(tmp_path / "generator") == str(tmp_path / "base")
    assert served_name(tmp_path / "base") == str(tmp_path / "base")


def test_what_is_missing_or_torn_is_named(tmp_path: Path) -> None:
    whole = model()
    whole.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    stored = load_file(weights)
    table = stored.pop("model.embed_tokens.weight")
    stored.pop("lm_head.weight")
    save_file(stored, weights)
    with pytest.raises(
        CheckpointError, match=r"must hold its input embeddings as model\.embed_tokens\.weight, got none"
    ):
        InputEmbeddings.from_pretrained(tmp_path)
    save_file({**stored, "model.embed_tokens.weight": table[:8].clone()}, weights)
    with pytest.raises(CheckpointError, match=r"must be float \[40, 16\] .*got torch\.float32 \[8, 16\]"):
        InputEmbeddings.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read .*header"):
        InputEmbeddings.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"as safetensors, got no model\.safetensors"):
        InputEmbeddings.from_pretrained(tmp_path)


def test_a_scale_that_is_not_made_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not stored: whoever does not make it would send garbage."""
    model("gemma").save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda *_: None)
    monkeypatch.setattr(GemmaPreTrainedModel, "_init_weights", lambda *_: None)
    with pytest.raises(ConfigError, match="built alone, got a GemmaForCausalLM"):
        InputEmbeddings.from_pretrained(tmp_path)


def test_a_form_that_no_server_reads_is_refused(tmp_path: Path) -> None:
    save_int8(model(), tmp_path)
    with pytest.raises(ConfigError, match=r"int8 rows.*store the checkpoint with int8=False"):
        InputEmbeddings.from_pretrained(tmp_path)


def test_a_model_that_reads_more_than_embeddings_is_refused(tmp_path: Path) -> None:
    PrefixBertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="got a PrefixBertForCausalLM"):
        InputEmbeddings.from_pretrained(tmp_path)
