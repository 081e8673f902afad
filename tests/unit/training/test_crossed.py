"""Teaching cross-attention: with the same recipes as soft prompts, and read in training as it is in use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.support.causal import FUSED, causal_generator, fused_generator
from tests.support.tiny import save_tiny_checkpoint, tiny_compressor
from tests.support.training import (
    log_of,
    pair_recipe,
    save_data,
    save_generator,
    save_sentence_encoder,
    save_tower,
    sentence_recipe,
    stage,
)
from vist_rag.checkpoint import load_compressor
from vist_rag.errors import ConfigError
from vist_rag.generation import CrossAttentionFusion, MemorySegment, Prompt, TextSegment, VistGenerator
from vist_rag.training.examples import Example
from vist_rag.training.objectives import Pve
from vist_rag.training.parts import train_only
from vist_rag.training.reading import MemoryReading
from vist_rag.training.recipe import check_recipe
from vist_rag.types import Passage

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

from vist_rag.training.baselines import ContinuedRun
from vist_rag.training.run import RecipeRun

CROSSED = [family for family, fusion in FUSED if fusion == "cross_attention"]
PASSAGES = [
    Passage("The old bridge was built in 1867 by Marie Curie.", title="bridge"),
    Passage("The river runs from a lake to the sea."),
]
EXAMPLES = [
    Example(PASSAGES, "who built the bridge", "marie curie", raw=False),
    Example(PASSAGES[1:], "where", "the sea", raw=False),
]


def reading(family: str, **options: Any) -> MemoryReading:
    model = MemoryReading(tiny_compressor(), fused_generator(family, "cross_attention"), **options)
    train_only(model, ("resampler", "projector"))
    return model.train()


@pytest.mark.parametrize("family", CROSSED)
def test_memory_is_read_in_training_as_it_is_in_use(family: str) -> None:
    model = reading(family)
    generator, (example, _) = model._generator[0], EXAMPLES
    model.eval()
    with torch.no_grad():
        found = model(**model.batch([example], random.Random(0)))["loss"]
        memories = model.compressor.encode([p.content for p in example.passages])
        segments: list[Any] = []
        for memory in memories:
            segments += [TextSegment(model.template.memory), MemorySegment(memory)]
        asked = TextSegment(model.template.question.replace("{question}", example.question))
        target = torch.cat(
            (generator.tokenize(" " + example.target), generator.ids([generator.tokenizer.eos_token_id]))
        )
        with generator.fusion.condition(generator, [Prompt((*segments, asked))]) as inputs:
            length = inputs["inputs_embeds"].shape[1]
            table = generator.model.get_input_embeddings()
            whole = inputs | {"inputs_embeds": torch.cat((inputs["inputs_embeds"], table(target)[None]), dim=1)}
            whole["attention_mask"] = torch.ones(1, length + len(target))
            if "shown" in inputs:
                whole["shown"] = F.pad(inputs["shown"], (0, 0, 0, len(target)), value=-1)
                whole["prefix_mask"] = torch.arange(length + len(target))[None] < length
            logits = generator.model(**whole).logits[0, length - 1 : -1]
    # The untaught pointer of a model that copies adds a loss of its own where the answer stands in its text: not here.
    torch.testing.assert_close(found, F.cross_entropy(logits, target), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", CROSSED)
def test_cross_attention_and_resampler_learn_and_nothing_else(family: str) -> None:
    model = reading(family, distil=1.0, pve=Pve(torch.zeros(1000), weight=0.1, mask="random"))
    model.teach_itself()
    out = model(**model.batch(EXAMPLES, random.Random(0)))
    assert out["pve"] > 0
    assert out["believed"] > 0
    out["loss"].backward()
    learned = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    for layer in (0, 1):
        for part in ("query", "key", "value", "output"):
            assert f"fusion.blocks.{layer}.{part}.weight" in learned
        assert f"fusion.blocks.{layer}.gate" in learned
    assert {"fusion.norm.weight", "fusion.place", "fusion.projector.0.weight"} <= learned  # the latter for PVE
    assert any(name.startswith("compressor.resampler") for name in learned)
    assert not any(name.startswith(("lm.", "compressor.tower")) for name in learned)


def test_what_is_pointed_at_is_text() -> None:
    model = reading("prefix_bert")
    batch = model.batch(EXAMPLES, random.Random(0))
    assert any(batch["pointers"])  # the passages hold the answers, but as memory
    figures = model(**batch)
    assert "pointed" not in figures


def test_a_recipe_teaches_it_and_what_comes_out_answers(tmp_path: Path) -> None:
    for name, save in (("tower", save_tower), ("generator", save_generator), ("data", save_data)):
        (tmp_path / name).mkdir()
        save(tmp_path / name)
    recipe = pair_recipe(tmp_path / "tower", tmp_path / "generator", stage("align"), stage("distill", answers=4))
    recipe["generator"] |= {"fusion": "cross_attention", "every": 2}
    directory = RecipeRun(recipe, tmp_path / "data", tmp_path / "out").run()
    assert log_of(tmp_path / "out" / "distill")[-1]["believed"] >= 0
    generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device="cpu")
    assert isinstance(generator.fusion, CrossAttentionFusion)
    assert list(generator.fusion.blocks) == ["1"]
    assert generator.fusion.blocks["1"].output.weight.any()  # it started from nothing
    memory = load_compressor(directory, device="cpu").encode([PASSAGES[0].content])[0]
    assert generator.generate([Prompt((MemorySegment(memory), TextSegment("who")))])[0].completion_tokens > 0


def test_pointing_at_memory_that_is_looked_up_is_taught() -> None:
    """What is pointed at is the slot of the very memory that spells the answer, also of the second of two."""
    torch.manual_seed(0)
    model = MemoryReading(tiny_compressor(), fused_generator("prefix_bert", "pointed"))
    seen = {}
    answers = model._gold

    def gold(*arguments: Any) -> Any:
        seen["gold"], seen["shown"] = answers(*arguments), arguments[-2]
        return seen["gold"]

    model._gold = gold  # type: ignore[method-assign]
    fusion = model.fusion
    spelt = iter(("lake", "sea"))  # by the first memory, by the second
    fusion.spell = lambda latents: [next(spelt), *[""] * (len(latents) - 1)]  # type: ignore[method-assign]
    example = Example((Passage("the lake"), Passage("the sea")), "where", "sea", raw=False)
    figures = model(**model.batch([example], random.Random(0)))
    assert "pointed" in figures
    found = seen["gold"][0, 0, :-1].view(seen["shown"].shape[1:]).nonzero()
    assert len(found)
    sea = int(model._generator[0].tokenize("sea")[0])
    assert all(int(seen["shown"][0, place, slot]) == sea for place, slot in found.tolist())
    figures["loss"].backward()
    assert fusion.pointed.weight.grad.any()


def test_a_fresh_generator_takes_it_too(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "data").mkdir()
    base, data = save_sentence_encoder(tmp_path / "base"), save_data(tmp_path / "data")
    recipe = sentence_recipe(base, stage("lexical"), stage("align"))
    recipe["generator"] |= {"fusion": "cross_attention", "direct": False, "spelling": 8, "packer_width": 4}
    directory = RecipeRun(recipe, data, tmp_path / "out").run()
    generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device="cpu")
    assert isinstance(generator.fusion, CrossAttentionFusion)
    assert generator.fusion.speller is not None
    assert generator.fusion.blocks["0"].output.weight.any()


@pytest.mark.parametrize("fusion", ["soft_prompt", "cross_attention"])
def test_a_checkpoint_is_entered_anew(tmp_path: Path, fusion: str) -> None:
    start = save_tiny_checkpoint(tmp_path / "start")
    before = VistGenerator.from_pretrained(start / "generator", fusion=start / "fusion", device="cpu")
    run = ContinuedRun(
        {
            "start": {"checkpoint": str(start)},
            "generator": {"fusion": fusion},
            "data": {"text": ["texts.jsonl"]},
            "stages": [stage("align")],
        },
        tmp_path,
        tmp_path / "out",
    )
    _, generator = run.parts()
    assert generator.fusion.kind == fusion
    assert generator.fusion.config.fingerprint == ""
    assert torch.equal(generator.fusion.speller[1].weight, before.fusion.speller[1].weight)
    assert not torch.equal(generator.fusion.projector[1].weight, before.fusion.projector[1].weight)
    if fusion == "cross_attention":
        assert generator.fusion.config.attention is not None
        assert not generator.fusion.config.attention.direct  # it reads what memory spells
    else:
        assert torch.equal(generator.fusion.boundaries, before.fusion.boundaries)


@pytest.mark.parametrize(
    ("generator", "settings", "message"),
    [
        ({"fusion": "cross_attention"}, {"states": 1.0}, "states must be 0 with cross-attention"),
        ({"fusion": "cross_attention"}, {"ideal": 0.5}, "ideal must be 0 where cross-attention reads latents as they"),
        ({"fusion": "telepathy"}, {}, "fusion must be one of soft_prompt, cross_attention, got 'telepathy'"),
        ({"fusion": "cross_attention", "every": 0}, {}, "every must be a whole number above 0, got 0"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_loaded(
    generator: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    recipe = pair_recipe(Path("tower"), Path("lm"), stage("align", **settings))
    recipe["generator"] |= generator
    with pytest.raises(ConfigError, match=message):
        check_recipe(recipe)


def test_shapes_alone_are_enough_to_plan(tmp_path: Path) -> None:
    from vist_rag.config import ResamplerConfig
    from vist_rag.training.parts import pretrained_generator

    save_generator(tmp_path)
    recipe = {"generator": {"pretrained": str(tmp_path), "fusion": "cross_attention"}}
    generator = pretrained_generator(recipe, ResamplerConfig(width=16, heads=2), meta=True)
    assert all(weight.device.type == "meta" for weight in generator.fusion.parameters())
    real = CrossAttentionFusion.for_model(causal_generator("llama", seed=1).model, 16)
    assert {n: w.shape for n, w in generator.fusion.named_parameters() if "blocks" in n} == {
        n: w.shape for n, w in real.named_parameters() if "blocks" in n
    }
