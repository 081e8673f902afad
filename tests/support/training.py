"""Tiny recipes, with tiny models in the layout of the hub's; as ``python -m tests.support.training``, a run to kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from tests.support.causal import causal_generator
from tests.support.tiny import BERT_SIZES, TOWER, tiny_tokenizer

TEXT = "The old bridge was built in 1867 by Marie Curie. The river runs from a lake to the sea."
ENDS = ("the sea", "a river", "the old lake", "the bridge of the river", "marie")
VISION: dict[str, Any] = {k: v for k, v in TOWER.items() if k != "model_type"} | {"image_size": 112, "num_channels": 3}
RATES = {"1.0": 0.5, "0.5": 0.5}
PVE = {"weight": 0.5, "mask": "frequency", "rate": 0.5}


def save_sentence_encoder(directory: Path) -> Path:
    """A sentence encoder: config, weights, tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT_SIZES)).save_pretrained(directory)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def save_tower(directory: Path) -> Path:
    """A CLIP of 64 patches a page."""
    torch.manual_seed(3)
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=text)).save_pretrained(directory)
    return directory


def save_generator(directory: Path, family: str = "llama") -> Path:
    """A causal language model."""
    generator = causal_generator(family, seed=1)
    generator.model.save_pretrained(directory)
    generator.tokenizer.save_pretrained(directory)
    return directory


def save_data(directory: Path) -> Path:
    """``texts.jsonl`` and ``questions.jsonl``."""
    texts = [{"title": f"Bridge {i}", "text": f"{TEXT} {ENDS[i % 5]}" * (1 + i % 2)} for i in range(40)]
    rows = [
        {"question": f"When was bridge {i} built?", "answers": ["1867"], "title": "Bridge", "context": TEXT}
        for i in range(6)
    ]
    for name, lines in (("texts.jsonl", texts), ("questions.jsonl", rows)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def stage(name: str, **settings: Any) -> dict[str, Any]:
    """A stage of its name's kind."""
    size = {"patches": 100} if name in ("tower", "lexical") else {"batch": 2, "rates": RATES}
    return {"name": name, "kind": name, "steps": 2, "learning_rate": 1e-3, **size, **settings}


def pair_recipe(tower: Path, generator: Path, *stages: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """A pretrained tower and a pretrained causal language model."""
    return {
        "seed": 0,
        "threads": 1,
        "probe": {"measure": False},
        "tower": {"pretrained": str(tower)},
        "resampler": {"latents_per_page": 16, "width": 16, "heads": 2, "layers": 1, "tower_layers": [1, -1]},
        "generator": {"pretrained": str(generator), "projector_width": 32},
        "data": {"text": ["texts.jsonl"], "questions": {"questions.jsonl": 1.0}},
        "stages": [*stages],
        "settings": {"max_new_tokens": 4, "budget": {"k_raw": 0, "k_memory": 1, "latents": 8}},
    } | tables


def sentence_recipe(base: Path, *stages: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """A fresh tower, and a generator that is made from a sentence encoder."""
    return {
        "seed": 0,
        "threads": 1,
        "probe": {"measure": False},
        "tower": TOWER,
        "resampler": {"width": 16, "heads": 2, "layers": 1, "tower_layers": [1, -1], "salience": True},
        "generator": {"base": str(base), "vocabulary": 70, "projector_width": 32},
        "data": {"text": ["texts.jsonl"], "questions": {"questions.jsonl": 1.0}},
        "stages": [*stages],
        "settings": {"max_new_tokens": 4, "budget": {"k_raw": 0, "k_memory": 1, "latents": 8}},
    } | tables


def log_of(directory: Path) -> list[dict[str, Any]]:
    """What a stage logged."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def main(recipe: Path, data: Path, output: Path, killed_at: int) -> None:
    """Run a recipe; list the batches that each process makes, and kill the process instead of making ``killed_at``."""
    from vist_rag.training.run import RecipeRun
    from vist_rag.training.trainer import Batches

    made = Batches.__getitem__

    def listed(batches: Batches, number: int) -> dict[str, Any]:
        if number == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with (output / f"batches-{os.environ.get('RANK', '0')}.txt").open("a") as file:
            file.write(f"{number}\n")
        return made(batches, number)

    output.mkdir(exist_ok=True)
    Batches.__getitem__ = listed  # type: ignore[method-assign]
    RecipeRun(json.loads(recipe.read_text()), data, output).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
