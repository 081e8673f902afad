"""A recipe (TOML) -> a trained checkpoint: build the parts, run the stages, export."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from tokenizers import Regex, Tokenizer, decoders, processors
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from vist_rag.compression import PassageCompressor, VistCompressor
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.config import FusionConfig, RendererConfig, ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.generation import SoftPromptFusion, VistGenerator
from vist_rag.generation.prefix_bert import PrefixBertConfig, PrefixBertForCausalLM
from vist_rag.rendering import GlyphAtlas, Renderer
from vist_rag.retrieval.embedder import DEFAULT_MODEL, offline_files
from vist_rag.training.data import LengthBatches, Question, expand, read_jsonl, read_questions, titled
from vist_rag.training.examples import ExampleMix
from vist_rag.training.export import save_checkpoint
from vist_rag.training.lexical import LexicalAlignment, WordSalad, lexical_batch, piece_salience
from vist_rag.training.reading import MemoryReading
from vist_rag.training.tower import TowerReading, reading_batch
from vist_rag.training.trainer import train_stage
from vist_rag.training.vocabulary import prune_vocabulary
from vist_rag.types import Passage

_PIXELS_PER_CHARACTER = 5.1  # of the embedded atlas, over English text: an estimate for batching only
_VOCABULARY_SAMPLE = 12  # one text in so many is counted


def load_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe by path, or by the name of one that ships with the package.

    Raises:
        ConfigError: If there is none, or it is no TOML.
    """
    shipped = files("vist_rag.training") / "recipes" / f"{name}.toml"
    source = Path(name) if Path(name).is_file() else shipped
    if not source.is_file():
        names = sorted(p.name.removesuffix(".toml") for p in (files("vist_rag.training") / "recipes").iterdir())
        raise ConfigError(f"recipe must be a TOML file or one of {', '.join(names)}, got {str(name)!r}.")
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name} must be TOML ({error}).") from error


class RecipeRun:
    """One recipe on one machine: parts are built when a stage first needs them.

    Args:
        recipe: What ``load_recipe`` read.
        data: Folder that the recipe's file patterns are relative to.
        output: Where checkpoints, logs and the exported model go.
    """

    def __init__(self, recipe: dict[str, Any], data: Path, output: Path) -> None:
        self.recipe, self.data, self.output = recipe, data, output
        self.seed = int(recipe.get("seed", 0))
        if threads := recipe.get("threads"):
            torch.set_num_threads(int(threads))
        torch.set_flush_denormal(True)
        torch.manual_seed(self.seed)
        output.mkdir(parents=True, exist_ok=True)
        self.atlas = _atlas(recipe.get("font_atlas", "assets"))
        self.base = base_model(recipe["generator"]["base"])
        self._texts: list[Passage] | None = None

    def run(self) -> Path:
        """Run every stage that is not finished, and export; returns the checkpoint directory."""
        if not self.recipe.get("stages"):
            raise ConfigError("recipe must have at least one [[stages]] table, got none.")
        before: Path | None = None
        for stage in self.recipe["stages"]:
            directory = self.output / stage["name"]
            if not (directory / "final" / "model.safetensors").is_file():
                self._stages()[stage["kind"]](stage, directory, before)
            before = directory / "final"
        compressor, generator = self.parts()
        load_parts(MemoryReading(compressor, generator), directory / "final")
        return save_checkpoint(
            self.output / "model", compressor, generator, settings=self.recipe.get("settings", {}), int8=True
        )

    def parts(self) -> tuple[PassageCompressor, VistGenerator]:
        """A compressor and a generator with fresh weights, the generator's layers from the base model."""
        torch.manual_seed(self.seed)
        recipe = self.recipe
        compressor = VistCompressor.build(
            recipe["tower"], self.atlas, resampler=ResamplerConfig(**recipe.get("resampler", {}))
        )
        tokenizer, old_ids = self.tokenizer()
        sizes = compressor.resampler_config
        fusion = FusionConfig(
            sizes.memory_width,
            json.loads((self.base / "config.json").read_text())["hidden_size"],
            hidden_width=recipe["generator"]["projector_width"],
            spelling=recipe["generator"].get("spelling", 0),
            spelling_width=sizes.spelling_width,
        )
        return compressor, _generator(self.base, tokenizer, old_ids, fusion)

    def tokenizer(self) -> tuple[Tokenizer, list[int]]:
        """The pruned vocabulary, counted once and kept in the output folder."""
        vocabulary, ids = self.output / "tokenizer.json", self.output / "old_ids.json"
        if not (vocabulary.is_file() and ids.is_file()):
            full = plain(Tokenizer.from_file(str(self.base / "tokenizer.json")))
            sample = [titled(p.title, p.text) for p in self.texts()[::_VOCABULARY_SAMPLE]]
            chunks = (sample[i : i + 1000] for i in range(0, len(sample), 1000))
            pruned, old_ids = prune_vocabulary(full, chunks, self.recipe["generator"]["vocabulary"])
            ids.write_text(json.dumps(old_ids))
            pruned.save(str(vocabulary))
        return plain(Tokenizer.from_file(str(vocabulary))), json.loads(ids.read_text())

    def texts(self) -> list[Passage]:
        """All plain text, in one seeded order."""
        if self._texts is None:
            rows = (row for path in expand(self.data, self.recipe["data"]["text"]) for row in read_jsonl(path))
            self._texts = [
                Passage(r["text"], id="-", title=r.get("title", "")) for r in rows if 30 < len(r["text"]) < 1200
            ]
            random.Random(self.seed).shuffle(self._texts)
        return self._texts

    def questions(self) -> tuple[list[Question], list[float]]:
        """All questions, and the weight of each."""
        rows: list[Question] = []
        weights: list[float] = []
        for pattern, weight in self.recipe["data"]["questions"].items():
            some = read_questions(expand(self.data, [pattern]))
            rows += some
            weights += [float(weight)] * len(some)
        return rows, weights

    def _tower_stage(self, stage: dict[str, Any], directory: Path, before: Path | None) -> None:
        tower = VisionTower.from_config(tower_config(self.recipe["tower"]))
        tokenizer, old_ids = self.tokenizer()
        words = load_file(str(self.base / "model.safetensors"))["embeddings.word_embeddings.weight"]
        model = TowerReading(tower, words[torch.tensor(old_ids)])
        if before is not None:
            _load(model, before / "model.safetensors")
        renderer = Renderer(self.atlas, RendererConfig(channels=self.recipe["tower"]["num_channels"]))
        texts, indices = self._text_batches(stage)

        def build(some: list[int], _: int) -> dict[str, Any]:
            return reading_batch([texts[i] for i in some], renderer, tokenizer)

        train_stage(model, indices, build, directory, learning_rate=stage["learning_rate"], seed=self.seed)

    def _lexical_stage(self, stage: dict[str, Any], directory: Path, before: Path | None) -> None:
        compressor, generator = self.parts()
        words = cast(Tensor, generator.model.get_input_embeddings().weight)
        heads = None
        if stage.get("reading"):
            heads = TowerReading(cast(VisionTower, compressor.tower), words.detach().clone())
        parts = MemoryReading(compressor, generator)
        if before is not None:
            load_parts(parts, before)
        compressor.tower.requires_grad_(stage.get("train_tower", False))
        model = LexicalAlignment(compressor, generator.fusion, words, heads, self._salience(compressor))
        model.train()
        tokenizer, _ = self.tokenizer()
        texts, indices = self._text_batches(stage)
        share = stage.get("salad", 0.0)
        salad = WordSalad(texts[::_VOCABULARY_SAMPLE], tokenizer) if share else None

        def build(some: list[int], step: int) -> dict[str, Any]:
            rng = random.Random(f"{self.seed}-{stage['name']}-{step}")
            batch = [texts[i] for i in some]
            if salad:
                batch = [salad(len(text), rng) if rng.random() < share else text for text in batch]
            return lexical_batch(
                batch,
                compressor,
                tokenizer,
                reading=heads is not None,
                spelling=generator.fusion.config.spelling,
            )

        train_stage(
            model, indices, build, directory, learning_rate=stage["learning_rate"], seed=self.seed, result=parts
        )

    def _salience(self, compressor: PassageCompressor) -> Tensor | None:
        """How much each word piece matters; None for a compressor that does not tell."""
        if not compressor.resampler_config.salience:
            return None
        sample = [titled(p.title, p.text) for p in self.texts()[::_VOCABULARY_SAMPLE]]
        return piece_salience(self.tokenizer()[0], sample)

    def _text_batches(self, stage: dict[str, Any]) -> tuple[list[str], LengthBatches]:
        """All plain text, in batches of ``stage["patches"]`` patches."""
        texts = [titled(p.title, p.text) for p in self.texts()]
        patches = [min(256, int(len(text) * _PIXELS_PER_CHARACTER / 14) + 1) for text in texts]
        return texts, LengthBatches(patches, budget=stage["patches"], steps=stage["steps"], seed=self.seed)

    def _stages(self) -> dict[str, Callable[[dict[str, Any], Path, Path | None], None]]:
        return {"tower": self._tower_stage, "lexical": self._lexical_stage, "read": self._read_stage}

    def _read_stage(self, stage: dict[str, Any], directory: Path, before: Path | None) -> None:
        compressor, generator = self.parts()
        rates = {float(rate): float(weight) for rate, weight in stage["rates"].items()}
        shares = {name: float(stage.get(name, 0.0)) for name in ("ideal", "slips", "distil")}
        model = MemoryReading(compressor, generator, rates=rates, salience=self._salience(compressor), **shares)
        if before is not None:
            load_parts(model, before)
        if model.distil:
            model.teach_itself()
        model.train()
        compressor.tower.requires_grad_(stage.get("train_tower", False))
        if not stage.get("train_compressor", True):
            compressor.requires_grad_(False)
            generator.fusion.projector.requires_grad_(False)
        # Memory was taught these embeddings; they stay.
        generator.model.get_input_embeddings().requires_grad_(False)
        draw = ExampleMix(stage, self.texts(), *self.questions())

        def build(_: list[int], step: int) -> dict[str, Any]:
            rng = random.Random(f"{self.seed}-{stage['name']}-{step}")
            return model.batch(draw(rng), rng)

        train_stage(
            model,
            _Steps(stage["steps"]),
            build,
            directory,
            learning_rate=stage["learning_rate"],
            seed=self.seed,
            schedule=stage.get("schedule", "cosine"),
            pretrained_rate=stage.get("pretrained_rate", 1.0),
        )


class _Steps(Dataset[list[int]]):
    """So many steps whose batches are drawn, not listed."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[int]:
        return []


def load_parts(model: MemoryReading, directory: Path) -> None:
    """Weights of an earlier stage: of the tower alone, or of everything.

    Raises:
        CheckpointError: If the file holds neither.
    """
    path = directory / "model.safetensors"
    with safe_open(str(path), framework="pt") as file:
        names = list(file.keys())
        tower = {n.removeprefix("tower."): file.get_tensor(n) for n in names if n.startswith("tower.")}
    if tower:
        model.compressor.tower.load_state_dict(tower)
    else:
        _load(model, path)


def _load(model: torch.nn.Module, path: Path) -> None:
    try:
        load_model(model, str(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this recipe ({error}); train from the start.") from error


def _atlas(name: str) -> GlyphAtlas:
    if name == "assets":
        return GlyphAtlas.load(Path(str(files("vist_rag"))) / "assets" / "noto-sans-10px.safetensors")
    return GlyphAtlas.load(name)


def base_model(name: str) -> Path:
    """Directory of a base model: a path, the packaged encoder, or a hub id (downloaded)."""
    if Path(name).is_dir():
        return Path(name)
    if name == DEFAULT_MODEL and (packaged := offline_files()):
        return packaged
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, without padding and truncation."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def written_decoder() -> decoders.Decoder:
    """Tokens to text as people write it: BERT's tokens stand apart at every hyphen, apostrophe and comma."""
    spaced = {
        r"(?<=\w) - (?=\w)": "-",
        r"(?<=\w) / (?=\w)": "/",
        r"(?<=\w) ' (?=\w)": "'",
        r"(?<=\b\d|\b\d\d|\b\d\d\d), (?=\d\d\d\b)": ",",
        r"(?<=\d)\. (?=\d)": ".",
        r"(?<=\d) %": "%",
        r"(?<=[(\[]) | (?=[)\]])": "",
    }
    written = [decoders.Replace(Regex(pattern), content) for pattern, content in spaced.items()]
    return decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), *written])


def _generator(base: Path, tokenizer: Tokenizer, old_ids: list[int], fusion_config: FusionConfig) -> VistGenerator:
    """A generator whose layers come from a BERT-like encoder, with the pruned vocabulary."""
    fields = json.loads((base / "config.json").read_text())
    begin, end, pad = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    config = PrefixBertConfig(
        **{
            name: fields[name]
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
            )
        },
        vocab_size=len(old_ids),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = PrefixBertForCausalLM(config)
    state = {f"bert.{k}": v for k, v in load_file(str(base / "model.safetensors")).items() if "pooler" not in k}
    words = "bert.embeddings.word_embeddings.weight"
    state[words] = state[words][torch.tensor(old_ids)]
    state = {name: tensor for name, tensor in state.items() if name in dict(model.named_parameters())}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    with torch.no_grad():
        # The head starts as the identity: a state is compared with the word embeddings as it is.
        model.cls.predictions.transform.dense.weight.copy_(torch.eye(config.hidden_size))
    tokenizer.decoder = written_decoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", begin)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=config.max_position_embeddings,
    )
    fusion = SoftPromptFusion(fusion_config)
    fusion.match_scale(cast(Tensor, model.get_input_embeddings().weight))
    return VistGenerator(model, wrapped, fusion)
