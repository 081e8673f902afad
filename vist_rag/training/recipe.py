"""A recipe (TOML): found, overridden, checked before anything is loaded."""

from __future__ import annotations

import copy
import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from vist_rag.config import RendererConfig, ResamplerConfig
from vist_rag.errors import ConfigError

READING = ("align", "qa", "distill", "lm")
"""Kinds of stages that teach to read memory; they differ in what they practise unless told otherwise. ``lm`` is the
paper's: sequences whose first tokens are memory and whose rest is to be told."""
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "align": {
        "reconstruct": {"weight": 0.4, "words": [8, 100]},
        "continue": {"weight": 0.3, "words": [20, 100]},
        "next_token": {"weight": 0.3, "words": [40, 140]},
    },
    "qa": {"answer": {"weight": 1.0, "words": [20, 140]}},
    "distill": {"answer": {"weight": 1.0, "words": [20, 140]}},
}
KINDS = ("vist", "text_encoder", "text_encoder_flat", "mean_pool")
"""Compressors that are compared (``vist_rag.training.baselines``)."""
PARTS = ("tower", "resampler", "projector", "meaning", "packer", "boundaries", "generator", "embeddings", "lora")
"""What a stage can train. ``projector`` is all of the fusion (cross-attention too), ``generator`` all of it but its
input embeddings; ``meaning`` is resampler and projector but for what spells, so that memory is spelt as before."""


# ------------------------------------------------------------------------------------------------- what a setting is


@dataclass(frozen=True)
class _Value:
    """What a setting must be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_rates(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(_is_number(weight) and weight >= 0 for weight in value.values()):
        return False
    try:
        return all(0 < float(rate) <= 1 for rate in value) and sum(value.values()) > 0
    except (TypeError, ValueError):
        return False


def _one_of(*names: str) -> _Value:
    return _Value(f"one of {', '.join(names)}", lambda value: value in names)


def _some_of(*names: str) -> _Value:
    return _Value(
        f"a list of some of {', '.join(names)}",
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(one in names for one in value),
    )


_TEXT = _Value("text", lambda value: isinstance(value, str) and value != "")
_TEXTS = _Value("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
_FLAG = _Value("true or false", lambda value: isinstance(value, bool))
_COUNT = _Value("a whole number above 0", lambda value: _is_whole(value) and value > 0)
_WHOLE = _Value("a whole number of 0 or more", lambda value: _is_whole(value) and value >= 0)
_ABOVE_ZERO = _Value("a number above 0", lambda value: _is_number(value) and value > 0)
_WEIGHT = _Value("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
_SHARE = _Value("a share in 0..1", lambda value: _is_number(value) and 0 <= value <= 1)
_BOUNDS = _Value(
    "the shortest and the longest, such as [20, 140]",
    lambda value: (
        isinstance(value, list | tuple) and len(value) == 2 and all(map(_WHOLE.fits, value)) and value[0] <= value[1]
    ),
)
_TOKENS = _Value(
    "tokens as memory and tokens to be told, such as [4096, 512]",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_COUNT.fits, value)),
)
_ANY = _Value("a value", lambda _: True)  # checked where it is used
_RATES = _Value("shares in 0..1 with a weight each, such as { '1.0' = 0.7, '0.5' = 0.3 }", _are_rates)
_TABLE = _Value("a table", lambda value: isinstance(value, Mapping))
_STAGES = _Value(
    "[[stages]] tables",
    lambda value: isinstance(value, list) and all(isinstance(one, Mapping) for one in value),
)


# ------------------------------------------------------------------------------------------- which settings there are

_DECIDED = frozenset(
    [
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "learning_rate",
        "save_strategy",
        "save_steps",
        "eval_strategy",
        "eval_steps",
        "load_best_model_at_end",
        "metric_for_best_model",
    ]
)
"""Of ``TrainingArguments``, what the settings of a stage decide."""
_COMMON: dict[str, Any] = {
    "name": _TEXT,
    "kind": _TEXT,
    "steps": _COUNT,
    "learning_rate": _ABOVE_ZERO,
    "schedule": _TEXT,
    "warmup": _SHARE,
    "weight_decay": _WEIGHT,
    "pretrained_rate": _ABOVE_ZERO,
    "save_every": _COUNT,
    "trainer": _TABLE,
}
_PVE = {
    "weight": _WEIGHT,
    "mask": _one_of("none", "random", "frequency"),
    "rate": _SHARE,
    "temperature": _ABOVE_ZERO,
}
_TASK = {"weight": _WEIGHT, "words": _BOUNDS}
_READ = _COMMON | {
    "train": _some_of(*PARTS),
    "batch": _COUNT,
    "batch_words": _COUNT,
    "prompt_words": _COUNT,
    "memory_words": _COUNT,
    "raw": _SHARE,
    "distractors": _SHARE,
    "others": _COUNT,
    "ideal": _SHARE,
    "slips": _SHARE,
    "distil": _WEIGHT,
    "states": _WEIGHT,
    "teacher": _one_of("start", "live"),
    "answers": _WHOLE,
    "tasks": dict.fromkeys((*TASKS["align"], *TASKS["qa"]), _TASK),
    "rates": _RATES,
    "pve": _PVE,
}
STAGES: dict[str, dict[str, Any]] = {
    "tower": _COMMON | {"patches": _COUNT},
    "lexical": _COMMON
    | {
        "train": _some_of("tower", "resampler", "projector"),  # no generator runs
        "patches": _COUNT,
        "salad": _SHARE,
        "reading": _FLAG,
        "joined": _COUNT,
        "pve": _PVE,
    },
    **dict.fromkeys(READING, _READ),
    "lm": _COMMON | {"train": _some_of(*PARTS), "batch": _COUNT, "rates": _RATES, "pve": _PVE},
}
_RESAMPLER = {field.name: _ANY for field in fields(ResamplerConfig)}
_COMPRESSOR = {"window": _COUNT, "resampler": _RESAMPLER}
_RECIPE: dict[str, Any] = {
    "seed": _WHOLE,
    "threads": _COUNT,
    "font_atlas": _TEXT,
    "stages": _STAGES,
    "start": {"checkpoint": _TEXT},
    "tower": _TABLE,
    "resampler": _RESAMPLER,
    "renderer": {field.name: _ANY for field in fields(RendererConfig)},
    "generator": {
        "base": _TEXT,
        "pretrained": _TEXT,
        "revision": _TEXT,
        "dtype": _one_of("float32", "bfloat16", "float16"),
        "quantize": _one_of("4bit"),
        "vocabulary": _COUNT,
        "projector_width": _COUNT,
        "spelling": _WHOLE,
        "packer_width": _WHOLE,
        "copy_width": _WHOLE,
        "fusion": _one_of("soft_prompt", "cross_attention"),
        "every": _COUNT,
        "direct": _FLAG,
        "pointed": _FLAG,
        "lora": _TABLE,
    },
    "compressor": {"kind": _one_of(*KINDS), **_COMPRESSOR},
    "compressors": dict.fromkeys(KINDS, _COMPRESSOR),
    "ablations": _TABLE,
    "data": {"folder": _TEXT, "text": _TEXTS, "characters": _BOUNDS, "sequence": _TOKENS, "questions": _TABLE},
    "trainer": _TABLE,
    "probe": {"measure": _FLAG, "texts": _COUNT, "steps": _COUNT},
    "evaluation": {
        "every": _COUNT,
        "metric": _TEXT,
        "method": _TEXT,
        "rate": _Value("a number of 1 or more", lambda value: _is_number(value) and value >= 1),
        "block": _TABLE,
    },
    "settings": _TABLE,
}


# -------------------------------------------------------------------------------------------------- found, overridden


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe by path, or by the name of one that ships with the package, with some settings changed.

    Args:
        name: A TOML file, or a name.
        overrides: ``table.key=value`` with a TOML value; a stage is named: ``stages.align.steps=100``.
    Raises:
        ConfigError: If there is none, it is no TOML, or a setting is unknown, missing or of the wrong kind.
    """
    shipped = files("vist_rag.training") / "recipes" / f"{name}.toml"
    source = Path(name) if Path(name).is_file() else shipped
    if not source.is_file():
        names = sorted(p.name.removesuffix(".toml") for p in (files("vist_rag.training") / "recipes").iterdir())
        raise ConfigError(f"recipe must be a TOML file or one of {', '.join(names)}, got {str(name)!r}.")
    try:
        recipe = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {name} must be TOML ({error}).") from error
    recipe = override(recipe, overrides)
    check_recipe(recipe)
    return recipe


def override(recipe: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """A copy of the recipe with ``table.key=value`` settings changed.

    Raises:
        ConfigError: If a change is of another form, or names no stage.
    """
    changed = copy.deepcopy(dict(recipe))
    for change in changes:
        _override(changed, change)
    return changed


def _override(recipe: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    if not found or not all(path.split(".")):
        raise ConfigError(f"--set must be TABLE.KEY=VALUE, such as stages.align.steps=100; got {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a string without its quotes
    *tables, key = path.strip().split(".")
    at: Any = recipe
    for depth, table in enumerate(tables):
        if isinstance(at, list):
            names = [str(one.get("name")) for one in at]
            if table not in names:
                raise ConfigError(f"--set {override}: stage must be one of {', '.join(names)}, got {table!r}.")
            at = at[names.index(table)]
        else:
            at = at.setdefault(table, {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(tables[: depth + 1])} must be a table, got {at!r}.")
    if isinstance(at, list):
        raise ConfigError(f"--set {override}: name a stage and its setting, such as stages.align.steps=100.")
    at[key] = value


# ------------------------------------------------------------------------------------------------------------ checked


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Refuse what no stage would read, and what a stage would miss: a typing error must not cost a night.

    Raises:
        ConfigError: If a setting is unknown, missing or of the wrong kind, or settings do not fit each other.
    """
    _check(recipe, _RECIPE, "recipe")
    if not recipe.get("stages"):
        raise ConfigError("recipe must have at least one [[stages]] table, got none.")
    _check_trainer(recipe, "recipe")
    _check_models(recipe)
    if "evaluation" in recipe:
        _require(recipe["evaluation"], _RECIPE["evaluation"], ("every", "block"), "recipe, evaluation")
    names = [stage.get("name") for stage in recipe["stages"]]
    if len(set(names)) < len(names) or None in names:
        raise ConfigError(f"stages must have names of their own, got {', '.join(map(str, names))}; set name.")
    for stage in recipe["stages"]:
        kind, where = stage.get("kind"), f"stage {stage['name']}"
        if kind not in STAGES:
            raise ConfigError(f"{where}: kind must be one of {', '.join(STAGES)}, got {kind!r}.")
        _check(stage, STAGES[kind], where)
        _require(stage, STAGES[kind], ("steps", "learning_rate", "batch" if kind in READING else "patches"), where)
        for task, settings in stage.get("tasks", {}).items():
            _require(settings, _TASK, _TASK, f"{where}, tasks, {task}")
        _check_trainer(stage, where)
        _check_stage(stage, recipe, where)


def trained_parts(stage: Mapping[str, Any]) -> Sequence[str]:
    """The parts that a stage trains: its ``train``, or resampler and projector."""
    parts: Sequence[str] = stage.get("train", ("resampler", "projector"))
    return parts


def _check(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise ConfigError(f"{where}: unknown setting {key!r}; {hint}")
        wanted = known[key]
        expected = _TABLE if isinstance(wanted, Mapping) else wanted
        if not expected.fits(value):
            raise ConfigError(f"{where}: {key} must be {expected.words}, got {value!r}.")
        if isinstance(wanted, Mapping):
            _check(value, wanted, f"{where}, {key}")


def _require(table: Mapping[str, Any], known: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key not in table:
            expected = _TABLE if isinstance(known[key], Mapping) else known[key]
            raise ConfigError(f"{where}: {key} must be {expected.words}, got none.")


def _check_trainer(table: Mapping[str, Any], where: str) -> None:
    for key in table.get("trainer", {}):
        if key in _DECIDED:
            raise ConfigError(f"{where}, trainer: {key} must be left out, a stage's own settings decide it.")


def _check_models(recipe: Mapping[str, Any]) -> None:
    """Whether there is something to train: a checkpoint to start from, or a tower and a generator."""
    for name, table in recipe.get("ablations", {}).items():
        _check({name: table}, {name: {"set": _TEXTS}}, "recipe, ablations")
    needed = ("start",) if {"compressor", "compressors"} & recipe.keys() else ("tower", "generator")
    for table in ("data", *(needed if "start" not in recipe else ())):
        if table not in recipe:
            raise ConfigError(f"recipe must have a [{table}] table, got none.")
    if "compressor" in recipe:
        _require(recipe["compressor"], _RECIPE["compressor"], ("kind",), "recipe, compressor")
    if "start" in recipe:
        _require(recipe["start"], _RECIPE["start"], ("checkpoint",), "recipe, start")
        if "quantize" in recipe.get("generator", {}):
            raise ConfigError("recipe, generator: quantize must be left out where [start] names a checkpoint.")
        return
    generator = recipe["generator"]
    if ("base" in generator) == ("pretrained" in generator):
        raise ConfigError("recipe, generator: set either pretrained (a causal LM) or base (a sentence encoder).")
    if "base" in generator:
        _require(generator, _RECIPE["generator"], ("vocabulary",), "recipe, generator")
        if "quantize" in generator:
            raise ConfigError("recipe, generator: quantize must be left out where base is set; it needs pretrained.")


def _check_stage(stage: Mapping[str, Any], recipe: Mapping[str, Any], where: str) -> None:
    """Whether a stage has what it needs: models, data, and something to learn in every batch."""
    kind, data, parts = stage["kind"], recipe["data"], set(trained_parts(stage))
    crossed = recipe.get("generator", {}).get("fusion") == "cross_attention"
    if crossed and stage.get("states"):
        raise ConfigError(f"{where}: states must be 0 with cross-attention, where memory has no position to be taught.")
    if crossed and stage.get("ideal") and recipe["generator"].get("direct", True):
        raise ConfigError(f"{where}: ideal must be 0 where cross-attention reads latents as they are (direct).")
    if kind == "tower" and ("start" in recipe or "base" not in recipe["generator"] or "pretrained" in recipe["tower"]):
        raise ConfigError(
            f"{where}: kind tower needs a fresh [tower] and the base of a [generator], to read its words."
        )
    if "lora" in parts and ("start" in recipe or "lora" not in recipe["generator"]):
        raise ConfigError(f"{where}: train must name lora only where [generator.lora] sets adapters up.")
    if "quantize" in recipe.get("generator", {}) and (whole := parts & {"generator", "embeddings"}):
        raise ConfigError(
            f"{where}: train must not name {min(whole)} of a generator in 4 bits; train lora or leave it."
        )
    if (kind == "lm") != ("sequence" in data):
        raise ConfigError(
            f"{where}: kind lm, and no other, needs [data] sequence = [4096, 512] (tokens as memory, and to be told)."
        )
    if kind == "lm" and "start" not in recipe and "pretrained" not in recipe["generator"]:
        raise ConfigError(f"{where}: kind lm needs a pretrained generator, whose tokens are counted.")
    tasks = set(stage.get("tasks", TASKS.get(kind, {})))
    if stage.get("answers") and "answer" not in tasks:
        raise ConfigError(f"{where}: answers needs the task answer among tasks, got {', '.join(sorted(tasks))}.")
    asks = "answer" in tasks and not stage.get("answers")
    if asks and not data.get("questions"):
        raise ConfigError(f"{where}: the task answer needs [data.questions], or answers = N without labels.")
    counts_words = "pve" in stage or ("start" not in recipe and "base" in recipe["generator"])
    reads_texts = counts_words or kind not in READING or tasks != {"answer"} or stage.get("distractors")
    if (reads_texts or not data.get("questions")) and not data.get("text"):
        raise ConfigError(f"{where}: [data] must name text, got none.")
    # A batch that holds nothing of what is trained has no gradient.
    of_generator = {"generator", "embeddings", "lora"}
    for share, needed in (("raw", of_generator), ("ideal", of_generator | {"projector", "packer", "boundaries"})):
        if stage.get(share) and not parts & needed:
            listed = ", ".join(part for part in PARTS if part in needed)
            raise ConfigError(f"{where}: {share} must be 0 where train names none of {listed}, got {stage[share]}.")
