from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vist_rag import references
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.references import Reference, resolve, weights_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = "fedcba9876543210fedcba9876543210fedcba98"


def model(directory: Path, value: float = 1.0, *, name: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.full((3,), value)}, directory / name)
    (directory / "config.json").write_text("{}")
    return directory


def sharded(directory: Path) -> Path:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        model(directory, i, name=name)
    weight_map = {"b": names[1], "a": names[0], "c": names[1]}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two snapshots of one model; ``main`` is the first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    for value, commit in enumerate((COMMIT, OLD)):
        model(repository / "snapshots" / commit, value)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(OLD)
    return repository / "snapshots"


# ------------------------------------------------------------------------------------------------------------ hashing


def test_the_hash_is_of_names_sizes_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = sharded(tmp_path / "model")
    wanted = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        wanted.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    assert weights_sha256(directory) == wanted.hexdigest()
    monkeypatch.setattr(references, "_CHUNK", 7)
    assert weights_sha256(directory) == wanted.hexdigest()


def test_the_hash_is_of_what_transformers_reads(tmp_path: Path) -> None:
    """A cache of the hub holds what was asked for so far: other files may come and go."""
    directory = model(tmp_path / "model")
    before = weights_sha256(directory)
    (directory / "README.md").write_text("changed")
    model(directory, 5, name="consolidated.safetensors")
    model(directory / "onnx", 6)
    assert weights_sha256(directory) == before
    assert weights_sha256(model(tmp_path / "elsewhere")) == before
    assert weights_sha256(model(tmp_path / "other", 2)) != before


def test_every_byte_counts(tmp_path: Path) -> None:
    directory = model(tmp_path)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    hashes = {weights_sha256(directory)}
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        hashes.add(weights_sha256(directory))
    assert len(hashes) == 4


def test_a_bar_is_shown_for_what_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_sha256(model(tmp_path / "tiny"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(references, "_SHOWN", 0)
    weights_sha256(tmp_path / "tiny")
    assert "verifying tiny" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", None])
def test_pickle_is_refused(tmp_path: Path, name: str | None) -> None:
    if name:
        torch.save({"a": torch.ones(3)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"got none \(pickle is not read, .*save_pretrained"):
        weights_sha256(tmp_path)


def test_shards_that_are_missing_or_pickled_are_refused(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold model-00002-of-00002\.safetensors"):
        weights_sha256(directory)
    index = directory / "model.safetensors.index.json"
    torch.save({"a": torch.ones(3)}, directory / "shard.bin")
    index.write_text(json.dumps({"weight_map": {"a": "shard.bin"}}))
    with pytest.raises(CheckpointError, match=r"must hold shard\.bin as a safetensors file"):
        weights_sha256(directory)
    for torn in ("{", "[]", "{}", '{"weight_map": 1}'):
        index.write_text(torn)
        with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
            weights_sha256(directory)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    directory = model(tmp_path)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must be a whole model, got an adapter"):
        weights_sha256(directory)


# ----------------------------------------------------------------------------------------------------- local and hub


def test_a_local_directory_is_referred_to_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    reference = Reference.of("model")
    assert reference == Reference.of(directory) == Reference(str(directory), None, weights_sha256(directory))
    monkeypatch.chdir("/")
    assert reference.directory() == directory
    with pytest.raises(ConfigError, match="revision must be None for the local directory"):
        Reference.of(directory, "main")


def test_a_hub_model_is_referred_to_by_its_commit(hub: Path) -> None:
    reference = Reference.of("someone/model")
    assert reference == Reference("someone/model", COMMIT, weights_sha256(hub / COMMIT))
    assert Reference.of("someone/model", "v1") == Reference("someone/model", OLD, weights_sha256(hub / OLD))
    (hub.parent / "refs" / "main").write_text(OLD)  # the model moves on; the reference does not
    assert reference.directory() == hub / COMMIT
    assert resolve("someone/model") == hub / OLD


@pytest.mark.parametrize("id", ["someone/else", "/nowhere/at/all", "not an id!"])
def test_a_model_that_is_nowhere_is_named(hub: Path, id: str) -> None:
    with pytest.raises(CheckpointError, match=rf"local directory or a hub id, got '{id}'.*restore it"):
        resolve(id)
    with pytest.raises(CheckpointError, match=rf"got '{id}' \(revision v9\)"):
        Reference(id, "v9", "0" * 64).directory()


def test_other_weights_are_refused(tmp_path: Path, hub: Path) -> None:
    reference = Reference.of(model(tmp_path / "model"))
    model(tmp_path / "model", 2)
    got = weights_sha256(tmp_path / "model")
    message = rf"model {tmp_path}/model must .* sha256 {reference.sha256[:12]}, got {got[:12]}; restore the directory"
    with pytest.raises(CheckpointError, match=message):
        reference.directory()
    reference = Reference.of("someone/model")
    model(hub / COMMIT, 7)
    with pytest.raises(CheckpointError, match=rf"model someone/model .*; restore revision {COMMIT}, or train anew"):
        reference.directory()


# ---------------------------------------------------------------------------------------------------- stored, compared


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_a_reference_survives_json(dtype: str | None) -> None:
    reference = Reference("someone/model", COMMIT, "a" * 64, dtype)
    assert Reference.read(json.loads(json.dumps(asdict(reference))), "here") == reference


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": ""},
        {"id": 3},
        {"sha256": None},
        {"sha256": "abc"},
        {"sha256": "A" * 64},
        {"revision": 1},
        {"dtype": "object"},
        {"dtype": ["float32"]},
    ],
)
def test_what_is_no_reference_is_refused(change: dict[str, Any]) -> None:
    stored = asdict(Reference("someone/model", None, "a" * 64)) | change
    with pytest.raises(CheckpointError, match=r"reference in here must have id, revision, sha256, dtype, got"):
        Reference.read(stored, "here")


@pytest.mark.parametrize("stored", [None, [], "text", {}])
def test_what_is_no_object_is_refused(stored: object) -> None:
    with pytest.raises(CheckpointError, match="reference in here must have"):
        Reference.read(stored, "here")


def test_only_identical_weights_are_left_out() -> None:
    reference = Reference("someone/model", None, "a" * 64)
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    reference.check("tower", weights, {name: weight.clone() for name, weight in weights.items()})
    changed = weights["a"].clone()
    changed[2] = torch.nextafter(changed[2], torch.tensor(9.0))
    for theirs in (
        weights | {"a": changed},
        weights | {"a": weights["a"].bfloat16()},
        weights | {"a": weights["a"][:3]},
        {"b": weights["b"]},
    ):
        for one, other in ((weights, theirs), (theirs, weights)):
            with pytest.raises(ConfigError, match=r"tower must have the weights of someone/model.* got another a;"):
                reference.check("tower", one, other)


def test_only_what_transformers_reads_is_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    needed = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.model"]
    needed += ["model.safetensors.index.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]
    other = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "original/params.json"]
    other += ["flax_model.msgpack", "modeling_custom.py", "model.gguf"]
    kept = filter_repo_objects(
        needed + other, allow_patterns=list(references._NEEDED), ignore_patterns=list(references._NOT_NEEDED)
    )
    assert list(kept) == needed
