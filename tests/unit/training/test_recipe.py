"""Recipes are found, overridden and checked; nothing is loaded for it."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from vist_rag.errors import ConfigError
from vist_rag.training.recipe import check_recipe, load_recipe, override, trained_parts

SHIPPED = sorted(p.name.removesuffix(".toml") for p in (files("vist_rag.training") / "recipes").iterdir())
PAIR: dict[str, Any] = {
    "tower": {"pretrained": "a/tower"},
    "generator": {"pretrained": "a/model"},
    "data": {"text": ["texts.jsonl"]},
    "stages": [
        {"name": "align", "kind": "align", "steps": 10, "batch": 2, "learning_rate": 1e-3},
        {"name": "distill", "kind": "distill", "steps": 10, "batch": 2, "learning_rate": 1e-3, "answers": 100},
    ],
}


def changed(*changes: str) -> dict[str, Any]:
    return override(PAIR, changes)


def refused(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_recipe(changed(*changes))
    return str(caught.value)


def test_nothing_heavy_is_imported_to_check_a_recipe() -> None:
    probe = "import sys, vist_rag.training.recipe; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


# -------------------------------------------------------------------------------------------------------------- found


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_that_ships_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    check_recipe(recipe)
    for ablation in recipe.get("ablations", {}).values():
        check_recipe(override(recipe, ablation.get("set", ())))


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert [stage["kind"] for stage in load_recipe("embedded")["stages"]][:2] == ["tower", "lexical"]
    text = (files("vist_rag.training") / "recipes" / "smoke.toml").read_text()
    (tmp_path / "mine.toml").write_text(text)
    assert load_recipe(tmp_path / "mine.toml") == load_recipe("smoke")
    with pytest.raises(ConfigError, match=r"one of .*embedded.*smoke.*, got 'none-such'"):
        load_recipe("none-such")
    for content in (b"a = [", b"\xff"):
        (tmp_path / "broken.toml").write_bytes(content)
        with pytest.raises(ConfigError, match="must be TOML"):
            load_recipe(tmp_path / "broken.toml")


def test_a_recipe_is_overridden_before_it_is_checked() -> None:
    recipe = load_recipe("smoke", ["stages.align.steps=7", "seed=3"])
    assert recipe["stages"][0]["steps"] == 7
    assert recipe["seed"] == 3
    with pytest.raises(ConfigError, match="steps must be a whole number above 0, got 0"):
        load_recipe("smoke", ["stages.align.steps=0"])


# --------------------------------------------------------------------------------------------------------- overridden


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("2e-4", 2e-4),
        ("true", True),
        ("'frequency'", "frequency"),
        ("bfloat16", "bfloat16"),
        ("a/b-c", "a/b-c"),
        ("", ""),
        ("x=y", "x=y"),
        ("['tower', 'resampler']", ["tower", "resampler"]),
        ("{weight=1.0, mask='random'}", {"weight": 1.0, "mask": "random"}),
        ("{'1.0'=0.5}", {"1.0": 0.5}),
    ],
)
def test_a_value_is_toml_or_a_text_without_its_quotes(text: str, value: Any) -> None:
    assert changed(f"settings.new.key={text}")["settings"] == {"new": {"key": value}}


def test_a_stage_is_named_and_nothing_else_changes() -> None:
    before = copy.deepcopy(PAIR)
    recipe = changed("stages.distill.steps=99", "stages.distill.tasks.answer.weight=2.0", "seed=5")
    assert before == PAIR
    assert recipe["stages"][1] == before["stages"][1] | {"steps": 99, "tasks": {"answer": {"weight": 2.0}}}
    assert recipe["stages"][0] == before["stages"][0]
    assert recipe["seed"] == 5
    assert [stage["name"] for stage in recipe["stages"]] == ["align", "distill"]  # the order stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.align.steps", "must be TABLE.KEY=VALUE"),
        ("=3", "must be TABLE.KEY=VALUE"),
        ("stages..steps=3", "must be TABLE.KEY=VALUE"),
        ("stages.qa.steps=3", "stage must be one of align, distill, got 'qa'"),
        ("stages.align=3", "name a stage and its setting"),
        ("stages.align.steps.more=3", "stages.align.steps must be a table, got 10"),
    ],
)
def test_a_change_that_leads_nowhere_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(change)


# ------------------------------------------------------------------------------------------------------------ checked


def test_a_whole_recipe_passes() -> None:
    check_recipe(PAIR)
    assert tuple(trained_parts(PAIR["stages"][0])) == ("resampler", "projector")
    assert trained_parts(changed("stages.align.train=['projector']")["stages"][0]) == ["projector"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sead=1", "recipe: unknown setting 'sead'; did you mean seed?"),
        ("stages.align.learning_rat=1", "stage align: unknown setting 'learning_rat'; did you mean learning_rate?"),
        ("stages.align.pve.weightt=1", "stage align, pve: unknown setting 'weightt'; did you mean weight?"),
        ("stages.align.zzz=1", "stage align: unknown setting 'zzz'; known are name, kind, steps"),
        ("stages.align.tasks.answr.weight=1", "stage align, tasks: unknown setting 'answr'; did you mean answer?"),
        ("stages.align.patches=100", "stage align: unknown setting 'patches'"),  # of another kind
        ("resampler.latents=3", "recipe, resampler: unknown setting 'latents'; did you mean"),
        ("renderer.channelz=3", "recipe, renderer: unknown setting 'channelz'; did you mean channels?"),
        ("generator.vocabular=3", "recipe, generator: unknown setting 'vocabular'; did you mean vocabulary?"),
        ("ablations.less.sets=[]", "recipe, ablations, less: unknown setting 'sets'; did you mean set?"),
    ],
)
def test_what_no_stage_would_read_is_refused(change: str, message: str) -> None:
    assert message in refused(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=-1", "seed must be a whole number of 0 or more, got -1"),
        ("seed=1.5", "seed must be a whole number of 0 or more, got 1.5"),
        ("data=3", "data must be a table, got 3"),
        ("stages=3", "stages must be [[stages]] tables, got 3"),
        ("stages=[]", "at least one [[stages]] table"),
        ("data.text=texts.jsonl", "data: text must be a list of texts, got 'texts.jsonl'"),
        ("generator.dtype=float8", "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ("generator.quantize=8bit", "generator: quantize must be one of 4bit, got '8bit'"),
        ("stages.align.kind=read", "kind must be one of tower, lexical, align, qa, distill, lm, got 'read'"),
        ("data.sequence=[4096]", "sequence must be tokens as memory and tokens to be told, such as [4096, 512], got"),
        ("data.sequence=[4096, 0]", "sequence must be tokens as memory and tokens to be told"),
        ("generator.fusion=deep", "fusion must be one of soft_prompt, cross_attention, got 'deep'"),
        ("generator.every=0", "every must be a whole number above 0, got 0"),
        ("stages.align.name=distill", "names of their own, got distill, distill"),
        ("stages.align.steps=1.5", "steps must be a whole number above 0, got 1.5"),
        ("stages.align.steps=true", "steps must be a whole number above 0, got True"),
        ("stages.align.batch=0", "batch must be a whole number above 0, got 0"),
        ("stages.align.learning_rate=fast", "learning_rate must be a number above 0, got 'fast'"),
        ("stages.align.learning_rate=inf", "learning_rate must be a number above 0, got inf"),
        ("stages.align.train=['reader']", "train must be a list of some of tower, resampler, projector, meaning"),
        ("stages.align.train=tower", "train must be a list of some of"),
        ("stages.align.train=[]", "train must be a list of some of"),
        ("stages.align.raw=2", "raw must be a share in 0..1, got 2"),
        ("stages.align.rates={'1.5'=1.0}", "rates must be shares in 0..1 with a weight each"),
        ("stages.align.rates={all=1.0}", "rates must be shares in 0..1 with a weight each"),
        ("stages.align.rates={'0.5'=0.0}", "rates must be shares in 0..1 with a weight each"),
        ("stages.align.rates=0.5", "rates must be shares in 0..1 with a weight each"),
        ("stages.align.pve=1.0", "pve must be a table, got 1.0"),
        ("stages.align.pve.mask=rare", "pve: mask must be one of none, random, frequency, got 'rare'"),
        ("stages.distill.teacher=me", "teacher must be one of start, live, got 'me'"),
        ("stages.align.tasks={continue={words=[20, 10], weight=1.0}}", "words must be the shortest and the longest"),
        ("stages.align.tasks={continue={weight=1.0}}", "tasks, continue: words must be the shortest and the longest"),
        ("compressors={vist={window=0}}", "compressors, vist: window must be a whole number above 0, got 0"),
        ("evaluation.rate=0.5", "evaluation: rate must be a number of 1 or more, got 0.5"),
        ("evaluation.every=10", "evaluation: block must be a table, got none"),
        ("trainer.max_steps=5", "recipe, trainer: max_steps must be left out"),
        ("stages.align.trainer.per_device_train_batch_size=5", "stage align, trainer: per_device_train_batch_size"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(change: str, message: str) -> None:
    assert message in refused(change)


@pytest.mark.parametrize("key", ["steps", "learning_rate", "batch"])
def test_a_stage_must_say_what_it_needs(key: str) -> None:
    recipe = copy.deepcopy(PAIR)
    del recipe["stages"][0][key]
    with pytest.raises(ConfigError, match=f"stage align: {key} must be a .*number above 0, got none"):
        check_recipe(recipe)


@pytest.mark.parametrize("table", ["tower", "generator", "data"])
def test_a_recipe_needs_models_and_data(table: str) -> None:
    recipe = {name: value for name, value in PAIR.items() if name != table}
    with pytest.raises(ConfigError, match=rf"must have a \[{table}\] table"):
        check_recipe(recipe)
    if table != "data":
        check_recipe(recipe | {"start": {"checkpoint": "embedded"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["generator.base=b", "generator.vocabulary=9"], "either pretrained (a causal LM) or base"),
        (["start.checkpointt=x"], "did you mean checkpoint?"),
        (["start={}"], "start: checkpoint must be text, got none"),
        (["compressor.kind=vist"], "must have a [start] table"),
        (["stages.align.train=['lora']"], "only where [generator.lora] sets adapters up"),
        (
            ["generator.quantize=4bit", "stages.align.train=['projector', 'generator']"],
            "train must not name generator of a generator in 4 bits; train lora or leave it",
        ),
        (["generator={base='b', vocabulary=9, quantize='4bit'}"], "quantize must be left out where base is set"),
        (["start.checkpoint=x", "generator.quantize=4bit"], "quantize must be left out where [start] names"),
        (
            ["stages.align.answers=5"],
            "answers needs the task answer among tasks, got continue, next_token, reconstruct",
        ),
        (["stages.distill.answers=0"], "the task answer needs [data.questions], or answers = N"),
        (["data={questions={'q.jsonl'=1.0}}"], "stage align: [data] must name text"),
        (["data.sequence=[9, 3]"], "stage align: kind lm, and no other, needs [data] sequence"),
        (["stages.align.kind=lm"], "stage align: kind lm, and no other, needs [data] sequence"),
        (
            ["data.sequence=[9, 3]", "stages.align.kind=lm", "generator={base='b', vocabulary=9}"],
            "stage align: kind lm needs a pretrained generator",
        ),
        # Batches without anything that learns.
        (["stages.distill.raw=0.2"], "raw must be 0 where train names none of generator, embeddings, lora, got 0.2"),
        (["stages.align.train=['resampler']", "stages.align.ideal=0.5"], "ideal must be 0 where train names none of"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(changes: list[str], message: str) -> None:
    assert message in refused(*changes)


@pytest.mark.parametrize(
    "changes",
    [
        ["generator={base='b', vocabulary=9}"],
        ["generator.lora={r=4}", "stages.align.train=['lora']", "stages.align.raw=0.5"],
        ["generator.quantize=4bit", "generator.lora={r=4}", "stages.align.train=['lora']"],
        ["stages.align.train=['projector']", "stages.align.ideal=1.0"],
        ["stages.distill.answers=0", "data.questions={'q.jsonl'=1.0}"],
        ["trainer={bf16=true, gradient_accumulation_steps=4}"],
        ["evaluation={every=5, block={task='qa'}}"],
        ["start.checkpoint=embedded", "compressors={mean_pool={window=3, resampler={width=8}}}"],
    ],
)
def test_settings_that_fit_pass(changes: list[str]) -> None:
    check_recipe(changed(*changes))


def test_the_paper_is_followed() -> None:
    recipe = load_recipe("paper")
    (stage,) = recipe["stages"]
    assert recipe["data"]["sequence"] == [4096, 512]
    assert recipe["generator"]["fusion"] == "cross_attention"
    assert (stage["steps"], stage["learning_rate"], stage["schedule"], stage["warmup"]) == (2000, 3e-4, "cosine", 0.04)
    assert stage["pve"] == {"weight": 1.0, "mask": "frequency", "rate": 0.5, "temperature": 0.07}
    assert recipe["trainer"]["adam_beta2"] == 0.999


def test_a_tower_is_taught_only_where_it_is_fresh() -> None:
    recipe = changed("generator={base='b', vocabulary=9}", "tower={model_type='vit'}")
    recipe["stages"].insert(0, {"name": "tower", "kind": "tower", "steps": 1, "patches": 9, "learning_rate": 1.0})
    check_recipe(recipe)
    for change in ("tower.pretrained=a/tower", "generator={pretrained='a/model'}", "start.checkpoint=embedded"):
        with pytest.raises(ConfigError, match=r"stage tower: kind tower needs a fresh \[tower\] and the base"):
            check_recipe(override(recipe, [change]))
