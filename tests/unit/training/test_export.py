from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.compression import VistCompressor
from vist_rag.generation import MemorySegment, Prompt, VistGenerator
from vist_rag.training.export import save_checkpoint


def test_a_checkpoint_reads_back_as_one_that_fits_together(tmp_path: Path) -> None:
    compressor, generator = tiny_compressor(), tiny_generator()
    settings = {"max_new_tokens": 6, "budget": {"k_memory": 2}}
    assert save_checkpoint(tmp_path / "new", compressor, generator, settings=settings) == tmp_path / "new"
    assert json.loads((tmp_path / "new" / "vist.json").read_text()) == settings

    stored = load_file(tmp_path / "new" / "compressor" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.uint8, torch.int32}
    loaded = VistCompressor.from_pretrained(tmp_path / "new" / "compressor", dtype=torch.float32)
    assert loaded.fingerprint == compressor.fingerprint == generator.fusion.config.fingerprint
    # The weights are those of the original, to bf16; and so are the memories.
    for ours, theirs in zip(compressor.encode(["the sea"]), loaded.encode(["the sea"]), strict=True):
        torch.testing.assert_close(theirs.latents, ours.latents, atol=5e-2, rtol=5e-2)

    reader = VistGenerator.from_pretrained(
        tmp_path / "new" / "generator", fusion=tmp_path / "new" / "fusion", device="cpu"
    )
    memory = loaded.encode(["the old bridge"])[0]
    reader.fusion.check(memory)
    assert reader.generate([Prompt((MemorySegment(memory),))], max_new_tokens=2)[0].completion_tokens > 0


def test_a_generator_may_keep_its_own_precision(tmp_path: Path) -> None:
    generator = tiny_generator()
    save_checkpoint(tmp_path, tiny_compressor(), generator, int8=False)
    loaded = VistGenerator.from_pretrained(tmp_path / "generator", device="cpu")
    for name, tensor in generator.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert json.loads((tmp_path / "vist.json").read_text()) == {}
