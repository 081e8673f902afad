"""Task x data set x method x setting -> rows, and one result a block: ``vist-rag eval``.

A block of a recipe is one task on one set of questions with one choice of passages. Each of its cells, a method with a
setting, answers the same questions. Rows are written batch by batch, and a block that was stopped goes on where its
rows end.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation.icl import InContextLearning
from vist_rag.evaluation.lm import LanguageModelling
from vist_rag.evaluation.methods import (
    WITHOUT_BUDGET,
    Asked,
    EvalModel,
    Memory,
    Method,
    budget_of,
    check_method,
    make_method,
)
from vist_rag.evaluation.provenance import SEED, run_facts
from vist_rag.evaluation.qa import QuestionAnswering
from vist_rag.evaluation.results import FORMAT, Cell, RowFile, summarize
from vist_rag.evaluation.task import Reading, Task
from vist_rag.generation import MemorySegment, Prompt

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def load_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe of an evaluation by path, or by the name of one that ships with the package.

    Raises:
        ConfigError: If there is none, it is no TOML, or it has no blocks.
    """
    folder = files("vist_rag.evaluation") / "recipes"
    source: Any = Path(name) if Path(name).is_file() else folder / f"{name}.toml"
    if not source.is_file():
        names = sorted(p.name.removesuffix(".toml") for p in folder.iterdir())
        raise ConfigError(f"recipe must be a TOML file or one of {', '.join(names)}, got {str(name)!r}.")
    try:
        recipe = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {name} must be TOML ({error}).") from error
    if not recipe.get("blocks"):
        raise ConfigError(f"recipe {name} must have at least one [[blocks]] table, got none.")
    return recipe


SPREAD = ("dataset", "encoded_tokens", "n_memory", "top_k")
"""Settings of a block that may be lists: there is a block for each value, or for each choice of values."""


def blocks_of(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The blocks of a recipe, named: one for each value where a setting of ``SPREAD`` is a list; defaults filled in."""
    found = []
    defaults = {k: v for k, v in recipe.items() if k not in ("blocks", "checkpoints")}
    for block in recipe["blocks"]:
        whole = {"top_k": 1, **block}
        lists = {key: whole[key] for key in SPREAD if isinstance(whole.get(key), list)}
        for values in product(*lists.values()):
            one = {**defaults, **whole, **dict(zip(lists, values, strict=True))}
            k = one["top_k"]
            found.append({**one, "name": one.get("name", "{default}").format(default=_name(one), k=k)})
    names = [block["name"] for block in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"blocks must have names of their own, got {', '.join(sorted(names))}; set name.")
    return found


def _name(block: Mapping[str, Any]) -> str:
    dataset = "".join(c if c.isalnum() or c in "_-" else "_" for c in Path(str(block.get("dataset", "texts"))).name)
    parts = {
        "qa": (dataset, block.get("split", "dev"), block.get("passages", "gold"), f"k{block['top_k']}"),
        "icl": ("icl", dataset, f"{block.get('n_text', 2)}+{block.get('n_memory', 18)}"),
        "lm": ("lm", f"{block.get('encoded_tokens', 2048)}+{block.get('text_tokens', 2048)}"),
    }
    return "-".join(map(str, parts.get(str(block.get("task")), (dataset,))))


def cells_of(block: Mapping[str, Any]) -> list[Cell]:
    """Every method of a block with every setting.

    A method is a name, or a table with ``name`` and ``rates`` of its own. ``raw`` is read at rate 1 only: a smaller
    budget for it is ``truncated``.

    Raises:
        ConfigError: If a rate is below 1, or there are no methods.
    """
    rates, tokens = [float(rate) for rate in block.get("rates", [])], list(block.get("tokens", []))
    if not rates and not tokens:
        rates = [1.0]
    cells: list[Cell] = []
    for entry in block.get("methods", ()):
        name = entry if isinstance(entry, str) else str(entry["name"])
        own = rates if isinstance(entry, str) else [float(rate) for rate in entry.get("rates", rates)]
        if any(rate < 1 for rate in own):
            raise ConfigError(f"rates must be 1 or more, got {min(own)}.")
        if name in WITHOUT_BUDGET:
            cells.append(Cell(name))
        elif name == "raw":
            cells.append(Cell(name, 1.0))
        else:
            cells += [Cell(name, rate=rate) for rate in own]
            cells += [Cell(name, tokens=int(n)) for n in tokens]
    if not cells:
        raise ConfigError("methods must name at least one, got none.")
    return list(dict.fromkeys(cells))


def make_task(block: Mapping[str, Any], model: EvalModel, reading: Reading) -> Task:
    """The task of a recipe's block.

    Raises:
        ConfigError: If there is no such task or a setting is missing.
    """
    kinds: dict[str, Callable[[], Task]] = {
        "qa": lambda: QuestionAnswering(block, model, reading),
        "icl": lambda: InContextLearning(block, reading),
        "lm": lambda: LanguageModelling(block, model, reading),
    }
    if block.get("task") not in kinds:
        raise ConfigError(f"task must be one of {', '.join(kinds)}, got {block.get('task')!r}.")
    return kinds[block["task"]]()


def run_block(
    block: Mapping[str, Any],
    model: EvalModel,
    trained: Mapping[str, EvalModel],
    reading: Reading,
    *,
    command: str,
    progress: Progress,
    batch_size: int = 16,
) -> Path:
    """Answer every question of a block by every cell, and write ``NAME.jsonl`` and ``NAME.json``.

    Args:
        block: One of ``blocks_of``.
        model: The checkpoint that is evaluated.
        trained: Checkpoints of trained baselines, by method.
        reading: Where data and results are.
        command: The command as anyone can repeat it.
        progress: Shows how far it is.
        batch_size: Prompts in one forward pass; as many are lost by a crash at most.
    Returns:
        The result file.
    Raises:
        ConfigError: If a setting is outside what is allowed, or the rows there are of another setting.
        InputError: If data cannot be read, or no question fits the generator's context.
    """
    cells = cells_of(block)
    for cell in cells:
        check_method(cell.method, trained)
    task = make_task(block, model, reading)
    model = task.adapt(model)
    adapted = {name: task.adapt(other) for name, other in trained.items()}
    room = {asked.id: _room(model, asked, task) for asked in task.asked}
    least = model.memory_frame + 1 if model.generator.fusion.in_context else 0
    asked = [one for one in task.asked if room[one.id] >= least]
    if not asked:
        raise InputError(
            f"block {block['name']}: no question of {len(task.asked)} leaves room for a passage in the generator's "
            f"context ({model.generator.context_tokens} positions); shorten the questions or the answers."
        )
    _check_tokens(cells, model)
    used = {"memory": model, **{name: adapted[name] for name in adapted if any(c.method == name for c in cells)}}
    models = {name: {"sha256": one.sha256, "fingerprint": one.compressor.fingerprint} for name, one in used.items()}
    setting = {
        "block": {k: v for k, v in block.items() if k not in ("methods", "rates", "tokens", "index")},
        "asked": len(asked),
        "models": models,
    }
    rows_file = RowFile(reading.output / f"{block['name']}.jsonl", setting)
    begin = time.monotonic()
    with progress(block["name"], len(cells) * len(asked)) as advance:
        methods: dict[str, Method] = {}
        judged: dict[tuple[Any, ...], dict[str, Any]] = {}
        for cell in cells:
            left = [one for one in asked if (*cell.key, one.id) not in rows_file.done]
            advance(len(asked) - len(left))
            if not left:
                continue
            if cell.method not in methods:
                methods[cell.method] = make_method(cell.method, model, adapted, block.get(cell.method, {}))
                methods[cell.method].prepare(asked)
            for batch in _answered(cell, methods[cell.method], task, left, room, batch_size, judged):
                rows_file.append(batch)
                advance(len(batch))
    result = {
        "format": FORMAT,
        "name": block["name"],
        **{key: block[key] for key in ("task", "dataset", "split", "passages", "top_k") if key in block},
        "questions": len(asked),
        "left_out": len(task.asked) - len(asked),
        **run_facts(command, int(block.get("seed", SEED))),
        "seconds": round(time.monotonic() - begin, 1),
        "models": models,
        "metrics": list(task.metrics),
        **task.facts,
        **summarize(task, cells, rows_file.rows(), [one.id for one in asked]),
    }
    path = reading.output / f"{block['name']}.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    unfinished.replace(path)
    return path


def _room(model: EvalModel, asked: Asked, task: Task) -> int:
    """Positions that the generator's context has for passages."""
    limit = model.generator.context_tokens
    taken = model.generator.prompt_length(model.closed(asked.question)) + task.answer_tokens(asked)
    return 10**9 if limit is None else limit - taken


def _check_tokens(cells: Sequence[Cell], model: EvalModel) -> None:
    least = model.memory_frame + 1
    for cell in cells:
        if cell.tokens is not None and cell.tokens < least:
            raise ConfigError(f"tokens must be {least} or more (one latent of one passage), got {cell.tokens}.")


def _answered(
    cell: Cell,
    method: Method,
    task: Task,
    asked: Sequence[Asked],
    room: Mapping[str, int],
    batch_size: int,
    judged: dict[tuple[Any, ...], dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """Rows, a batch at a time; prompts of about one length share a batch.

    Two rates give a method the same prompt where a memory is smaller than either allows, or the context is full: it is
    answered once, and ``judged`` keeps what came of it.
    """
    model = method.model
    boundless = isinstance(method, Memory) and not model.generator.fusion.in_context
    built: list[tuple[Asked, Prompt, int]] = []
    for one in asked:
        raw = sum(model.raw_tokens(p) for p in one.passages)
        most = sys.maxsize if boundless else room[one.id]
        prompt = method.prompt(one.passages, one.question, budget_of(cell.rate, cell.tokens, raw, most))
        built.append((one, prompt, raw))
    built.sort(key=lambda row: (_key(cell, row[0], row[1]) not in judged, model.generator.prompt_length(row[1])))
    for start in range(0, len(built), batch_size):
        some = built[start : start + batch_size]
        new = [(one, prompt) for one, prompt, _ in some if _key(cell, one, prompt) not in judged]
        if new:
            begin = time.perf_counter()
            rows = task.judge(model, [one for one, _ in new], [prompt for _, prompt in new])
            ms = 1000 * (time.perf_counter() - begin) / len(new)
            for (one, prompt), row in zip(new, rows, strict=True):
                judged[_key(cell, one, prompt)] = {**row, "ms": round(ms, 2)}
        yield [
            {
                "method": cell.method,
                "rate": cell.rate,
                "tokens": cell.tokens,
                "id": one.id,
                **judged[_key(cell, one, prompt)],
                "passages": [p.id for p in one.passages],
                "origin_tokens": raw,
                "compressed_tokens": model.passage_tokens(prompt, one.question),
                "prompt_tokens": model.generator.prompt_length(prompt),
                "memory_bytes": _memory_bytes(prompt),
            }
            for one, prompt, raw in some
        ]


def _key(cell: Cell, asked: Asked, prompt: Prompt) -> tuple[Any, ...]:
    """What a method's prompt for a question is known by: its texts, and the sizes of its memories."""
    return cell.method, asked.id, *(len(s.memory) if isinstance(s, MemorySegment) else s.text for s in prompt.segments)


def _memory_bytes(prompt: Prompt) -> int:
    """Bytes of the latents that are read, in float16, as an index keeps them."""
    return sum(2 * s.memory.latents.numel() for s in prompt.segments if isinstance(s, MemorySegment))
