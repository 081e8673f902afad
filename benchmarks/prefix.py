"""Time to the first token of a follow-up question over the same memories, with the prefix cache and without.

    python benchmarks/prefix.py --json

A Llama-shaped model with random weights, ten memories of 64 latents, and questions that differ. With and without the
cache take turns at the same question, and each pair gives a ratio. The first question fills the cache: what that costs
over a generator without one stands beside. Whether the answers are the same is counted too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vist_rag.compression import VisualMemory
from vist_rag.config import FusionConfig
from vist_rag.evaluation.provenance import run_facts
from vist_rag.generation import PromptTemplate, SoftPromptFusion, VistGenerator

AT_LEAST = 2.0
MEMORIES, LATENTS, WIDTH = 10, 64, 256
_QUESTION = "which month does the keeper of lighthouse write down in red ink and when was lamp replaced by whom"
WORDS = _QUESTION.split()


def generators(layers: int, width: int, device: str) -> tuple[VistGenerator, VistGenerator]:
    """The same model with a cache and without."""
    torch.manual_seed(0)
    special = ["<unk>", "<s>", "</s>", "Document", "Question", "Answer", ":"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    fusion = SoftPromptFusion(FusionConfig(WIDTH, width, hidden_width=width))
    return VistGenerator(model, tokenizer, fusion), VistGenerator(model, tokenizer, fusion, prefix_cache_bytes=0)


def first_token_ms(generator: VistGenerator, prompt: Any) -> tuple[float, str]:
    """Milliseconds to the first token, and that token."""
    begin = time.perf_counter()
    (answer,) = generator.generate([prompt], max_new_tokens=1)  # what comes back is text, so a GPU is done
    return 1000 * (time.perf_counter() - begin), answer.text


def measure(kept: VistGenerator, plain: VistGenerator, rounds: int) -> dict[str, Any]:
    """Medians, ratios of pairs with their interval, and how many first tokens agree."""
    noise = torch.Generator().manual_seed(0)
    memories = [VisualMemory(torch.randn(LATENTS, WIDTH, generator=noise), "random") for _ in range(MEMORIES)]
    rng = np.random.default_rng(0)
    took: dict[str, list[float]] = {name: [] for name in ("without", "follow_up", "first_question")}
    same = 0
    for turn in range(2 + rounds):
        prompt = PromptTemplate().build(" ".join(rng.choice(WORDS, 12)), [], memories)
        kept.prefixes.clear()
        first, _ = first_token_ms(kept, PromptTemplate().build("which", [], memories))
        order = [("without", plain), ("follow_up", kept)]
        said = {}
        for name, generator in order if turn % 2 else reversed(order):
            ms, said[name] = first_token_ms(generator, prompt)
            if turn >= 2:
                took[name].append(ms)
        if turn >= 2:
            took["first_question"].append(first)
            same += said["without"] == said["follow_up"]
    ratios = np.array(took["without"]) / np.array(took["follow_up"])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return {
        "prompt_tokens": plain.prompt_length(prompt),
        "rounds": rounds,
        "first_token_ms": {name: round(float(np.median(times)), 2) for name, times in took.items()},
        "ratio": {"median": round(float(np.median(ratios)), 2), "95": [round(float(low), 2), round(float(high), 2)]},
        "ratios": [round(float(ratio), 2) for ratio in ratios],
        "at_least": AT_LEAST,
        "kept": bool(np.median(ratios) >= AT_LEAST),
        "same_first_token": f"{same} of {rounds}",
    }


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    kept, plain = generators(arguments.layers, arguments.width, arguments.device)
    result = {
        "benchmark": "prefix",
        **run_facts(" ".join(["python benchmarks/prefix.py", *sys.argv[1:]])),
        "device": arguments.device,
        "model": {"kind": "llama, random weights", "layers": arguments.layers, "width": arguments.width},
        "memories": MEMORIES,
        "latents": LATENTS,
        **measure(kept, plain, arguments.rounds),
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
        return
    for number, ratio in enumerate(result["ratios"], start=1):
        print(f"run {number}: {ratio:.2f} times as fast (limit {AT_LEAST})")
    print(f"median {result['ratio']}, {result['first_token_ms']} ms, same first token: {result['same_first_token']}")


if __name__ == "__main__":
    main()
