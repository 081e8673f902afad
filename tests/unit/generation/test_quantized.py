"""Generators in 4 bits, against the same weights as bitsandbytes reads them back."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.support.causal import causal_generator
from tests.support.tiny import tiny_compressor
from tests.support.training import pair_recipe, save_data, save_generator, save_tower, stage
from vist_rag.compression import VisualMemory
from vist_rag.errors import CheckpointError, ConfigError, MissingDependencyError
from vist_rag.generation import MemorySegment, Prompt, TextSegment, VistGenerator
from vist_rag.generation.int8 import save_int8
from vist_rag.generation.quantized import in_four_bits
from vist_rag.reader import VistReader
from vist_rag.references import Reference
from vist_rag.training.examples import Example
from vist_rag.training.parts import train_only
from vist_rag.training.reading import MemoryReading
from vist_rag.types import Passage

CPU = torch.device("cpu")
PROMPTS = [
    Prompt((TextSegment("the old bridge was built in 1867 question when answer"),)),
    Prompt(
        (
            TextSegment("the river runs"),
            MemorySegment(VisualMemory(torch.randn(9, 16, generator=torch.Generator().manual_seed(1)), "abc")),
            TextSegment("question where answer"),
        )
    ),
]
needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="4 bits need the extra 'bnb' (bitsandbytes)"
)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("missing", ["accelerate", "bitsandbytes"])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in ("accelerate", "bitsandbytes"):
        there = ModuleType(name)
        there.supported_torch_devices = {"cpu"}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, None if name == missing else there)
    with pytest.raises(MissingDependencyError, match=rf"needs {missing}, .* pip install 'vist-rag\[bnb\]'"):
        VistGenerator.from_pretrained("anything", device="cpu", quantize="4bit")


def test_a_device_that_it_does_not_run_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("bitsandbytes")
    old.supported_torch_devices = {"cuda", "xpu"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", old)
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
    with pytest.raises(ConfigError, match=r"device must be one .* \(cuda, xpu\), got cpu"):
        VistGenerator.from_pretrained("anything", device="cpu", quantize="4bit")


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantize must be '4bit' or None, got '3bit'"):
        VistGenerator.from_pretrained("anything", device="cpu", quantize="3bit")
    assert in_four_bits(None, torch.bfloat16, CPU) == {}


@needs_bnb
def test_weights_of_int8_rows_are_not_quantised_again(tmp_path: Path) -> None:
    generator = causal_generator("llama")
    save_int8(generator.model, tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="stored as int8 rows"):
        VistGenerator.from_pretrained(tmp_path, device="cpu", quantize="4bit")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        VistGenerator.from_pretrained(tmp_path / "nothing", device="cpu", quantize="4bit")


# --------------------------------------------------------------------------------------------------------- what is read


def loaded(directory: Path, family: str = "llama", **options: Any) -> VistGenerator:
    """A generator in 4 bits, with the fusion of the one that it was saved from."""
    save_generator(directory, family)
    generator = VistGenerator.from_pretrained(directory, device="cpu", quantize="4bit", **options)
    return VistGenerator(generator.model, generator.tokenizer, causal_generator(family, seed=1).fusion)


def read_back(directory: Path, generator: VistGenerator) -> VistGenerator:
    """A model of ordinary weights: those that the layers in 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=generator.model.dtype)
    for name, layer in generator.model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            own = plain.get_submodule(name).weight
            own.data = weight.T if own.shape != weight.shape else weight
    return VistGenerator(plain, generator.tokenizer, generator.fusion)


@torch.no_grad()
def logits(generator: VistGenerator, prompt: Prompt) -> torch.Tensor:
    with generator.fusion.condition(generator, [prompt]) as inputs:
        assert inputs["inputs_embeds"].dtype == generator.model.dtype
        return generator.model(**inputs).logits[0].float()


@needs_bnb
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_are_in_4_bits_and_answer_as_what_they_stand_for(tmp_path: Path, family: str) -> None:
    generator = loaded(tmp_path, family)
    model = generator.model
    assert model.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    of_layers = {n: w for n, w in plain.named_parameters() if ".layers." in n and w.dim() == 2}
    assert {n for n, w in model.named_parameters() if w.dtype == torch.uint8} == of_layers.keys()
    assert all(model.get_parameter(n).nbytes * 4 == w.nbytes for n, w in of_layers.items())
    meant = read_back(tmp_path, generator)
    for prompt in PROMPTS:
        got, wanted, exact = (logits(g, prompt) for g in (generator, meant, causal_generator(family, seed=1)))
        assert (got - wanted).norm() / wanted.norm() < 0.03  # bf16
        assert (got - exact).norm() / exact.norm() > 0.03
    alone = [generator.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert all(answer.completion_tokens > 1 for answer in alone)
    assert "".join(generator.stream(PROMPTS[1], max_new_tokens=6)).strip() == alone[1].text


@needs_bnb
def test_products_may_be_of_full_precision(tmp_path: Path) -> None:
    generator = loaded(tmp_path, dtype=torch.float32)
    assert generator.model.dtype == torch.float32
    for prompt in PROMPTS:
        wanted = logits(read_back(tmp_path, generator), prompt)
        torch.testing.assert_close(logits(generator, prompt), wanted, atol=1e-3, rtol=1e-3)


@needs_bnb
def test_threads_and_gradients_find_the_weights_as_they_were(tmp_path: Path) -> None:
    generator = loaded(tmp_path)
    layer = generator.model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: generator.generate(PROMPTS[:1], max_new_tokens=4)[0], range(8)))
    assert len(set(answers)) == 1
    assert torch.equal(layer.weight.data, before)
    embeds = torch.randn(1, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    generator.model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().max() > 0


@needs_bnb
def test_memory_is_taught_to_a_generator_in_4_bits(tmp_path: Path) -> None:
    from vist_rag.training.export import save_checkpoint
    from vist_rag.training.trainer import train_stage

    generator, compressor = loaded(tmp_path / "lm"), tiny_compressor()
    reading = MemoryReading(compressor, generator, distil=1.0)
    train_only(reading, ("resampler", "projector"))
    reading.teach_itself()
    before = {name: weight.detach().clone() for name, weight in reading.named_parameters()}
    examples = [Example((Passage("the old bridge was built in 1867"),), "when", "in 1867", raw=False)]
    train_stage(
        reading.train(), 2, lambda n: reading.batch(examples, random.Random(n)), tmp_path / "run", learning_rate=1e-2
    )
    moved = {name for name, weight in reading.named_parameters() if not torch.equal(weight, before[name])}
    assert any(name.startswith("fusion.projector") for name in moved)
    assert any(name.startswith("compressor.resampler") for name in moved)
    assert not [name for name in moved if name.startswith("lm.")]
    # Its checkpoint refers to the weights as they are stored, and is read in either way.
    with pytest.raises(ConfigError, match="generator_base must name where the weights"):
        save_checkpoint(tmp_path / "new", compressor, generator)
    base = Reference.of(tmp_path / "lm")
    directory = save_checkpoint(tmp_path / "new", compressor, generator, generator_base=base)
    asked = Prompt((MemorySegment(compressor.encode(["a lake"])[0]), TextSegment("who")))
    for quantize, kind in (("4bit", "Linear4bit"), (None, "Linear")):
        again = VistGenerator.from_pretrained(
            directory / "generator", fusion=directory / "fusion", device="cpu", quantize=quantize
        )
        assert type(again.model.model.layers[0].mlp.up_proj).__name__ == kind
        assert again.generate([asked], max_new_tokens=3)[0].completion_tokens > 0
    with torch.no_grad():
        generator.model.get_input_embeddings().weight[0] += 1
    with pytest.raises(ConfigError, match=r"bit for bit, .* got another model\.embed_tokens\.weight"):
        save_checkpoint(tmp_path / "new", compressor, generator, generator_base=base)


@needs_bnb
def test_a_recipe_teaches_a_generator_in_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters need the extra 'train'")
    from vist_rag.training.run import RecipeRun

    for name, save in (("tower", save_tower), ("lm", save_generator), ("data", save_data)):
        (tmp_path / name).mkdir()
        save(tmp_path / name)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    stages = (stage("align"), stage("distill", answers=4, train=["resampler", "projector", "lora"]))
    recipe = pair_recipe(tmp_path / "tower", tmp_path / "lm", *stages)
    recipe["generator"] |= {"quantize": "4bit", "lora": lora}
    model = RecipeRun(recipe, tmp_path / "data", tmp_path / "out").run()
    assert "quantization_config" not in (model / "generator" / "config.json").read_text()
    assert json.loads((model / "generator" / "reference.json").read_text())["dtype"] == "bfloat16"
    reader = VistReader.from_pretrained(model, device="cpu")
    asked = Prompt((MemorySegment(reader.compressor.encode(["a lake"])[0]), TextSegment("who")))
    assert reader.generator.generate([asked], max_new_tokens=3)[0].completion_tokens > 0
    with pytest.raises(ConfigError, match="LoRA adapter, which is merged"):
        VistReader.from_pretrained(model, device="cpu", quantize="4bit")


@needs_bnb
def test_an_adapter_is_not_merged_into_4_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need the extra 'train'")
    from vist_rag.training.export import save_checkpoint

    save_generator(tmp_path)
    generator = VistGenerator.from_pretrained(tmp_path, device="cpu", quantize="4bit")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(generator.model, lora)
    adapted = VistGenerator(model, generator.tokenizer, causal_generator("llama").fusion)  # type: ignore[arg-type]
    directory = save_checkpoint(tmp_path / "new", tiny_compressor(), adapted, generator_base=Reference.of(tmp_path))
    with pytest.raises(ConfigError, match="LoRA adapter, which is merged"):
        VistGenerator.from_pretrained(directory / "generator", device="cpu", quantize="4bit")
    merged = VistGenerator.from_pretrained(directory / "generator", device="cpu", dtype=torch.bfloat16)
    whole = VistGenerator.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.model.get_parameter(name), whole.model.get_parameter(name))
