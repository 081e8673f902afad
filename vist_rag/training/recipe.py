"""A recipe (TOML): found, overridden, checked before anything is loaded."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vist_rag.errors import ConfigError

READING = ("align", "qa", "distill")
"""Kinds of stages that teach to read memory; they differ in what they practise unless told otherwise."""
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "align": {
        "reconstruct": {"weight": 0.4, "words": [8, 100]},
        "continue": {"weight": 0.3, "words": [20, 100]},
        "next_token": {"weight": 0.3, "words": [40, 140]},
    },
    "qa": {"answer": {"weight": 1.0, "words": [20, 140]}},
    "distill": {"answer": {"weight": 1.0, "words": [20, 140]}},
}
PARTS = ("tower", "resampler", "projector", "boundaries", "generator", "embeddings", "lora")
"""What a stage can train. ``projector`` is all of the fusion, ``generator`` all of it but its input embeddings."""

_ANY = object()  # a table that another library checks
_COMMON = dict.fromkeys(
    ("name", "kind", "steps", "learning_rate", "schedule", "warmup", "weight_decay", "pretrained_rate", "save_every")
) | {"train": None, "trainer": _ANY}
_PVE = dict.fromkeys(("weight", "mask", "rate", "temperature"))
_READ = (
    _COMMON
    | dict.fromkeys(("batch", "batch_words", "prompt_words", "raw", "distractors", "others", "ideal", "slips"))
    | dict.fromkeys(("distil", "states", "teacher", "answers"))
    | {"tasks": _ANY, "rates": _ANY, "pve": _PVE}
)
STAGES: dict[str, dict[str, Any]] = {
    "tower": _COMMON | dict.fromkeys(("patches",)),
    "lexical": _COMMON | dict.fromkeys(("patches", "salad", "reading", "joined")) | {"pve": _PVE},
    **dict.fromkeys(READING, _READ),
}
_RECIPE: dict[str, Any] = (
    dict.fromkeys(("seed", "threads", "font_atlas", "stages"))
    | dict.fromkeys(
        ("tower", "resampler", "renderer", "settings", "trainer", "compressor", "compressors", "ablations"), _ANY
    )
    | {
        "start": dict.fromkeys(("checkpoint",)),
        "generator": dict.fromkeys(
            ("base", "vocabulary", "projector_width", "spelling", "pretrained", "revision", "dtype")
        )
        | {"lora": _ANY},
        "data": {"folder": None, "text": None, "characters": None, "questions": _ANY},
        "evaluation": dict.fromkeys(("every", "metric", "method", "rate")) | {"block": _ANY},
    }
)


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


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Refuse what no stage would read: a typing error must not cost a night.

    Raises:
        ConfigError: If a setting is unknown, missing or of the wrong kind.
    """
    _check_keys(recipe, _RECIPE, "recipe")
    if not recipe.get("stages"):
        raise ConfigError("recipe must have at least one [[stages]] table, got none.")
    for table in ("data", "generator"):
        if table not in recipe and not (table == "generator" and "start" in recipe):
            raise ConfigError(f"recipe must have a [{table}] table, got none.")
    names = [stage.get("name") for stage in recipe["stages"]]
    if len(set(names)) < len(names) or None in names:
        raise ConfigError(f"stages must have names of their own, got {', '.join(map(str, names))}; set name.")
    for stage in recipe["stages"]:
        where = f"stage {stage['name']}"
        kind = stage.get("kind")
        if kind not in STAGES:
            raise ConfigError(f"{where}: kind must be one of {', '.join(STAGES)}, got {kind!r}.")
        _check_keys(stage, STAGES[kind], where)
        needed = ("steps", "learning_rate", "batch" if kind in READING else "patches")
        for key in needed:
            value = stage.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{where}: {key} must be a number above 0, got {value!r}.")
        for part in stage.get("train", ()):
            if part not in PARTS:
                raise ConfigError(f"{where}: train must name parts among {', '.join(PARTS)}, got {part!r}.")
        for task in stage.get("tasks", ()):
            if task not in TASKS["align"] | TASKS["qa"]:
                known = ", ".join(TASKS["align"] | TASKS["qa"])
                raise ConfigError(f"{where}: tasks must be among {known}, got {task!r}.")


def _check_keys(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise ConfigError(f"{where}: unknown setting {key!r}; {hint}")
        inner = known[key]
        if isinstance(inner, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {key} must be a table, got {value!r}.")
            _check_keys(value, inner, f"{where}, {key}")


def trained_parts(stage: Mapping[str, Any]) -> Sequence[str]:
    """The parts that a stage trains: its ``train``, or resampler and projector."""
    parts: Sequence[str] = stage.get("train", ("resampler", "projector"))
    return parts
