"""The report page: what stands in it comes from the files, and marks and sentences follow from hand-made cases."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.synthetic_results import block, cell, latency, pair, synthetic_directory, write
from vist_rag.errors import InputError, MissingDependencyError
from vist_rag.evaluation.report import load_results, write_report
from vist_rag.evaluation.tables import controls, rate_table, score

pytest.importorskip("matplotlib")


def _row(table: str, method: str) -> list[str]:
    """Cells of the first row of a method, without its name."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {method} "))
    return [part.strip() for part in line.strip("|").split(" |")][1:]


def _page(tmp_path: Path, *results: dict[str, Any]) -> str:
    return write_report(write(tmp_path / "results", *results), tmp_path / "page.md")[0].read_text("utf-8")


# ------------------------------------------------------------------------------------------------------- main table


def test_scores_are_per_cent_with_intervals_under_the_rate_that_was_asked() -> None:
    table = rate_table(block([cell("closed_book", None, 0.0512), cell("memory", 4.0, 0.3), cell("memory", 2.3, 0.4)]))
    assert table.splitlines()[0] == "| EM | no rate | 2.3× | 4× |"
    assert _row(table, "closed book") == ["5.1 [0.0, 11.1]", "", ""]
    assert _row(table, "memory (ours, shipped)") == ["", "40.0 [34.0, 46.0]", "30.0 [24.0, 36.0]"]


def test_a_number_of_tokens_that_was_asked_is_a_column_of_its_own() -> None:
    some = [cell("memory", None, 0.4, tokens=64), cell("memory", 2.3, 0.3), cell("mean_pool", None, 0.2, tokens=64)]
    table = rate_table(block(some))
    assert table.splitlines()[0] == "| EM | 64 tokens | 2.3× |"
    assert _row(table, "memory (ours, shipped)") == ["**40.0** [34.0, 46.0]", "30.0 [24.0, 36.0]"]


def test_bold_is_the_best_of_a_column_but_no_control_nor_raw_nor_closed_book() -> None:
    cells = [cell("raw", 2.3, 0.9), cell("shuffled_memory", 2.3, 0.8), cell("closed_book", 2.3, 0.7)]
    cells += [cell("memory", 2.3, 0.3), cell("mean_pool", 2.3, 0.4), cell("newcomer", 2.3, 0.4)]
    table = rate_table(block(cells))
    bold = [line.split(" |")[0].strip("| ") for line in table.splitlines() if "**" in line]
    assert bold == ["mean pool", "newcomer"]


def test_nothing_is_bold_where_there_is_nothing_to_be_better_than() -> None:
    assert "**" not in rate_table(block([cell("raw", None, 0.5), cell("memory", 2.3, 0.4)]))


def test_of_perplexity_the_lowest_is_best_and_it_is_no_per_cent() -> None:
    cells = [{"method": m, "rate": 2.3, "perplexity": p} for m, p in (("memory", 9.5), ("mean_pool", 10.25))]
    lm = block(cells, metrics=["perplexity"], lower_is_better=["perplexity"])
    assert [score(lm, one) for one in lm["cells"]] == ["**9.50**", "10.25"]


@pytest.mark.parametrize(("difference", "mark"), [(-0.05, "↓"), (-0.04, "≈"), (0.0, "≈"), (0.04, "≈"), (0.05, "↑")])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_mark_tells_how_a_method_compares_with_memory(difference: float, mark: str, swapped: bool) -> None:
    test = pair("mean_pool", 2.3, difference, half=0.04)
    if swapped:
        test |= {"method": "memory", "against": "mean_pool", "difference": -difference}
        test["difference_95"] = [-end for end in reversed(test["difference_95"])]
    some = block([cell("memory", 2.3, 0.4), cell("mean_pool", 2.3, 0.3)], [test])
    assert score(some, some["cells"][1]) == f"30.0 [24.0, 36.0] {mark}"
    assert score(some, some["cells"][0]) == "**40.0** [34.0, 46.0]"


def test_there_is_no_mark_from_another_rate_another_metric_or_another_method() -> None:
    tests = [
        pair("mean_pool", 4.0, 0),
        pair("mean_pool", 2.3, 0, metric="f1"),
        pair("mean_pool", 2.3, 0, against="raw"),
    ]
    some = block([cell("memory", 2.3, 0.4), cell("mean_pool", 2.3, 0.3)], tests)
    assert score(some, some["cells"][1]) == "30.0 [24.0, 36.0]"


def test_perplexity_is_compared_by_its_log_and_lower_is_better() -> None:
    cells = [{"method": m, "rate": 2.3, "perplexity": p} for m, p in (("memory", 9.5), ("mean_pool", 10.25))]
    lm = block(
        cells, [pair("mean_pool", 2.3, 0.07, metric="nll")], metrics=["perplexity"], lower_is_better=["perplexity"]
    )
    assert score(lm, lm["cells"][1]) == "10.25 ↓"


# ---------------------------------------------------------------------------------------------------------- sentences


def _controls(shuffled: float, *, raw: float = 0.5, memory: float = 0.4, tests: Any = ()) -> str:
    cells = [cell("closed_book", None, 0.1), cell("raw", 1.0, raw), cell("memory", 2.3, memory)]
    return controls(block([*cells, cell("shuffled_memory", 2.3, shuffled)], tests))


def test_the_sentence_on_controls_flips_where_a_control_does_not_fall_to_closed_book() -> None:
    closed = "Controls, and the interval of closed book, 10.0 [4.0, 16.0]: shuffled memory is "
    assert _controls(0.16).startswith(f"{closed}within it (16.0 at 2.3×).")
    assert _controls(0.17).startswith(f"{closed}above it (17.0 at 2.3×).")
    assert _controls(0.03).startswith(f"{closed}below it (3.0 at 2.3×).")


def test_the_sentence_on_controls_has_their_paired_test() -> None:
    test = pair("shuffled_memory", 2.3, 0.01, against="closed_book", against_rate=None)
    assert "(17.0 at 2.3×, paired difference may be 0)" in _controls(0.17, tests=[test])


def test_the_sentence_on_raw_text_names_what_is_better() -> None:
    assert _controls(0.1).endswith("Nothing is better than raw text (50.0).")
    better = "Better than raw text (50.0): memory (ours, shipped) (51.0 at 2.3×, "
    assert _controls(0.1, memory=0.51).endswith(f"{better}no paired test).")
    test = pair("memory", 2.3, 0.01, against="raw", against_rate=1.0)
    assert _controls(0.1, memory=0.51, tests=[test]).endswith(f"{better}paired difference may be 0).")


def test_controls_without_closed_book_are_said_to_have_nothing_to_be_held_against() -> None:
    assert "no interval of closed book" in controls(block([cell("shuffled_memory", 2.3, 0.1)]))
    assert controls(block([cell("memory", 2.3, 0.1)])) == ""


# --------------------------------------------------------------------------------------------------------------- page


def test_a_page_has_every_block_its_figures_and_its_provenance(tmp_path: Path) -> None:
    cells = [cell("closed_book", None, 0.05), cell("raw", 1.0, 0.5), cell("memory", 2.3, 0.4, memory_bytes=33_000)]
    page = _page(tmp_path, block(cells, [pair("raw", 1.0, 0.1, p=0.0004, against_rate=2.3)]))
    assert "#### synthetic: dev, gold passages, k = 1" in page
    assert "300 questions. Gold passage among the first k retrieved (per cent), by k: 1: 61.0, 5: 82.0." in page
    assert "| memory (ours, shipped) | 2.3× | 48.0 | 45.0 | 65.2 | 2.35 | 81.5 | 33.0 | 85.2 | 40.0 |" in page
    assert "| EM | raw text 1× | memory (ours, shipped) 2.3× | +10.0 | [+6.0, +14.0] | 10 | 25 | < 0.001 |" in page
    row = "| synthetic-dev-gold-k1.json | 2001-02-03T04:05:06+00:00 | 0123456789ab | 0 | memory ffffffffffff | 1 |"
    assert f"{row} `` vist-rag eval synthetic --seed 0 `` |" in page
    assert "- Machine 1: system Linux, device cpu, cores 2; python 3.11.0, torch 2.11.0" in page
    assert "resilience |" not in page.split("## Question answering")[1], "a column that no cell fills is left out"


def test_unknown_recall_is_left_out(tmp_path: Path) -> None:
    retrieval = {"recall": {"1": None}, "answer": {"10": 0.9, "2": 0.5}}
    page = _page(tmp_path, block([cell("memory", 2.3, 0.4)], retrieval=retrieval))
    assert "Gold passage among" not in page
    assert "An answer string among the first k retrieved (per cent), by k: 2: 50.0, 10: 90.0." in page


def test_other_tasks_are_joined_into_one_table_each(tmp_path: Path) -> None:
    page = write_report(synthetic_directory(tmp_path), tmp_path / "page.md")[0].read_text("utf-8")
    icl = page.split("## In-context learning")[1].split("## Language")[0]
    assert "| examples as text | as memory | rate | method | agnews | sst2 |" in icl
    assert "| 2 | 18 | 2.3× | memory (ours, shipped) | **50.0** [40.0, 90.0] | **70.0** [60.0, 90.0] |" in icl
    lm = page.split("## Language modelling")[1].split("## Time")[0]
    assert "Perplexity, lower is better:" in lm
    assert "| 1024 | 512 |  | raw text | 8.25 [8.00, 8.50] |" in lm
    assert "| raw text | 50.0 [47.0, 54.0] |" in page.split("## Time to the first token")[1]


def test_every_picture_is_written_shown_and_described(tmp_path: Path) -> None:
    page, *images = write_report(synthetic_directory(tmp_path / "results"), tmp_path / "docs")
    assert page == tmp_path / "docs" / "benchmarks.md"
    shown = re.findall(r"!\[(.{40,})\]\((images/benchmarks/[a-z0-9-]+\.png)\)", page.read_text("utf-8"))
    assert [page.parent / path for _, path in shown] == images
    assert [path.stem for path in images] == ["score-tokens-synthetic", "score-k", "tokens-bytes", "first-token-k"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)
    assert not list(tmp_path.rglob("*.partial"))


def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    _, *images = write_report(write(tmp_path, block([cell("memory", 2.3, 0.4)])), tmp_path / "page.md")
    assert images == [tmp_path / "images" / "page" / "score-tokens-synthetic.png"]


def test_data_sets_whose_names_differ_in_signs_alone_have_plots_of_their_own(tmp_path: Path) -> None:
    some = [block([cell("memory", 2.3, 0.4)], name=name, dataset=name) for name in ("a_b", "a-b")]
    _, *images = write_report(write(tmp_path, *some), tmp_path / "page.md")
    assert [path.stem for path in images] == ["score-tokens-a-b", "score-tokens-a-b-2"]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    results = synthetic_directory(tmp_path / "results")
    first, second = (write_report(results, tmp_path / name / "page.md") for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_words_from_files_make_no_markup(tmp_path: Path) -> None:
    page = _page(tmp_path, block([cell("a|b <script>\n# c", 2.3, 0.4)], dataset="x", command="eval | `` tee"))
    assert r"| a\|b \<script\> # c | 40.0 [34.0, 46.0] |" in page
    assert r"`` eval \| ` ` tee ``" in page


# -------------------------------------------------------------------------------------------------------------- input


def test_results_come_in_the_order_of_the_page(tmp_path: Path) -> None:
    names = [result["name"] for result in load_results(synthetic_directory(tmp_path))]
    qa = ["gold-k1", "retrieved-k1", "retrieved-k5", "retrieved-k10"]
    assert names == [*(f"synthetic-dev-{name}" for name in qa), "icl-agnews", "icl-sst2", "lm-arxiv"]


def test_json_of_no_format_is_left_out_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path, block([cell("memory", 2.3, 0.4)]))
    (tmp_path / "other.json").write_text('{"em": 1}', "utf-8")
    (tmp_path / "list.json").write_text("[1]", "utf-8")
    with pytest.warns(UserWarning, match=r"left out: list\.json, other\.json"):
        (result,) = load_results(tmp_path)
    assert result["file"] == "synthetic-dev-gold-k1.json"


def _broken(**other: Any) -> str:
    return json.dumps(block([cell("memory", 2.3, 0.4)]) | other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "vist-ra', "torn.json is not whole JSON .* write it again with its command"),
        ('{"format": "vist-rag-eval/2"}', "must have the format vist-rag-eval/1 .* got 'vist-rag-eval/2'; move it"),
        ('{"format": ["vist-rag-eval/1"]}', "must have the format"),
        (_broken(task="chess"), "task must be one of qa, icl, lm, got 'chess'; write it again"),
        (_broken(cells=[]), "cells must hold at least one"),
        (_broken(cells=[{"method": "memory", "em": "high"}]), "em must be a number or null, got 'high'"),
        (_broken(cells=[{"method": "memory", "em": 0.1, "em_95": [0.1]}]), "em_95 must be two numbers"),
        (_broken(cells=[{"method": "memory", "rate": 2.3}] * 2), "memory twice at one rate"),
        (_broken(metrics=[]), "metrics must name one or more"),
        (_broken(top_k="five"), "top_k must be of type int"),
        (_broken(top_k=0), "top_k must be 1 or more, got 0"),
        (_broken(retrieval={"recall": {"one": 1}}), "retrieval.recall must be shares by k"),
        (_broken(cells=[{"method": "memory", "em": float("nan")}]), "NaN is not a number"),
        (_broken(cells=[{"method": "memory", "em": 0.1}]).replace("0.1", "1e999"), "em must be a number"),
        (_broken(paired=["x"]), "paired must be a list of objects"),
        (json.dumps(latency(points=[{"method": "raw", "k": 1}])), "each point must have ttft_ms"),
    ],
)
def test_a_torn_or_foreign_file_is_named_with_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, block([cell("memory", 2.3, 0.4)], name="whole"))
    (tmp_path / "torn.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match=message) as raised:
        write_report(tmp_path, tmp_path / "out.md")
    assert "torn.json" in str(raised.value)
    assert not (tmp_path / "out.md").exists()


def test_no_results_and_no_folder_are_errors_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no evaluation result .* vist-rag eval first"):
        load_results(tmp_path)
    with pytest.raises(InputError, match="must be a folder"):
        load_results(tmp_path / "none")


def test_one_block_in_two_files_is_refused(tmp_path: Path) -> None:
    text = json.dumps(block([cell("memory", 2.3, 0.4)]))
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"b\.json and a\.json must be two blocks"):
        load_results(tmp_path)


def test_two_blocks_for_one_place_of_a_joined_table_are_refused(tmp_path: Path) -> None:
    cells = [{"method": "memory", "rate": 2.3, "accuracy": 0.5}]
    some = [block(cells, name=name, task="icl", metrics=["accuracy"], n_text=2, n_memory=8) for name in "ab"]
    with pytest.raises(InputError, match=r"b\.json and a\.json must be two blocks"):
        _page(tmp_path, *some)


def test_an_output_that_is_another_file_is_refused(tmp_path: Path) -> None:
    results = write(tmp_path, block([cell("memory", 2.3, 0.4)]))
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(InputError, match=r"notes\.txt, another file"):
        write_report(results, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text("utf-8") == "mine"


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = synthetic_directory(tmp_path / "results")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vist-rag\[eval\]'"):
        write_report(results, tmp_path / "docs" / "page.md")
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [("reader/squad.dev.jsonl.gz", "squad.dev"), ("mine.json#a", "mine"), ("owner/name", "owner/name"), ("nq", "nq")],
)
def test_a_file_is_called_by_its_name_alone(tmp_path: Path, dataset: str, shown: str) -> None:
    page = _page(tmp_path, block([cell("memory", 2.0, 10.0)], dataset=dataset))
    assert f"### {shown}\n" in page
