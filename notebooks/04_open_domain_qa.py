# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   mystnb:
#     output_stderr: remove
# ---

# %% [markdown]
# # Open-domain question answering: exact match against tokens
#
# What does memory cost in right answers, and what does it save in tokens? This notebook asks a small slice of
# questions in several ways at equal budgets, draws the curve, and says how far a slice can be trusted. The commands
# for the whole are at the end.
#
# Where `VIST_RAG_DATA` points at a folder with Natural Questions, TriviaQA and PopQA in the layout of [the
# evaluation's reference](../reference/evaluation.md), their questions are asked. Where it does not, the same cells
# ask the questions of the corpus that comes with the package, which we wrote ourselves: the cell below says which of
# the two you are looking at.
#
# `pip install 'vist-rag[eval,offline]'`. Everything runs on a CPU, without network.

# %%
import json
import os
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp

from IPython.display import Image, display

from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.harness import blocks_of, run_block
from vist_rag.evaluation.methods import EvalModel
from vist_rag.evaluation.plots import METHODS, score_against_tokens
from vist_rag.evaluation.task import Reading

home = Path(mkdtemp(prefix="vist-rag-"))
data = Path(os.environ["VIST_RAG_DATA"]) if "VIST_RAG_DATA" in os.environ else None
print(
    "NQ, TriviaQA and PopQA" if data else "No VIST_RAG_DATA: the questions of the bundled corpus, in the place of NQ,"
)
print("" if data else "TriviaQA and PopQA. The figures below say nothing about those three.")

# %% [markdown]
# ## What is asked
#
# Of each data set, a seeded sample of 40 questions, each with a passage that answers it, so that reading is measured
# and not search. For NQ, TriviaQA and PopQA that is the first of the five best BM25 passages that holds an answer
# (`distant`); for the bundled corpus it is the passage that the question was written for (`gold`). Development splits
# are used where there are any: test questions are for the end.

# %%
if data:
    splits = {"nq_open": "dev", "triviaqa": "dev", "popqa": "test"}
    sets = [{"dataset": name, "split": split, "passages": "distant"} for name, split in splits.items()]
else:
    passages = {passage.id: passage for passage in demo_passages()}
    rows = [
        {
            "id": one.id,
            "question": one.question,
            "answers": one.answers,
            "title": passages[one.passage_id].title,
            "context": passages[one.passage_id].text,
        }
        for one in demo_questions("dev")
    ]
    questions = home / "bundled.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [{"dataset": str(questions), "passages": "gold"}]

# %% [markdown]
# ## In which ways
#
# A *rate* of 4.6 allows a 4.6th of what the passage takes as text. Every method stays below its budget.
#
# - `closed_book`: no passage. The floor.
# - `raw`: the passage as text. The ceiling of this generator.
# - `truncated`: as much of the text as the budget allows. It costs nothing, so it is what memory has to beat.
# - `memory`: ours.
# - `shuffled_memory`: the memory of another question's passage. It has to fall to the floor; if it does not, answers
#   come from somewhere else.

# %%
recipe = {
    "limit": 40,
    "rates": [2.3, 4.6, 9.0],
    "blocks": [
        {
            "name": f"slice-{Path(one['dataset']).stem}",
            "task": "qa",
            "methods": ["closed_book", "raw", "truncated", "memory", {"name": "shuffled_memory", "rates": [2.3]}],
            **one,
        }
        for one in sets
    ],
}
model = EvalModel.load(None)
reading = Reading(data, home / "results")
results = [
    json.loads(
        run_block(
            block,
            model,
            {},
            reading,
            command="notebooks/04_open_domain_qa.py",
            progress=lambda name, total: nullcontext(lambda done: None),
        ).read_text()
    )
    for block in blocks_of(recipe)
]

# %% [markdown]
# ## The figures
#
# Exact match with 95 % bootstrap intervals over questions, and what the passage took on average.

# %%
for result in results:
    print(f"{result['name']}, {result['questions']} questions")
    for cell in result["cells"]:
        low, high = cell["em_95"]
        rate = f"{cell['rate']:.1f}" if cell["rate"] else "-"
        ratio = f"{cell['ratio']:.2f}" if cell["ratio"] else "-"
        print(
            f"  {METHODS[cell['method']].label:26} rate {rate:>4}   EM {cell['em']:.2f} [{low:.2f}, {high:.2f}]"
            f"   {cell['compressed_tokens']:6.1f} tokens, ratio {ratio}"
        )

# %% [markdown]
# ## The curve
#
# Up is better, left is cheaper. The vertical lines are the intervals.

# %%
title = "Exact match against the tokens that a passage takes, 40 questions"
plot = score_against_tokens("slice", title, [(result["name"], result) for result in results])
display(Image(data=plot.png, width=800))
print(plot.alt)

# %% [markdown]
# *In words: raw text is a star at the upper right. The line of memory runs to the left of it, lower and far cheaper,
# and falls slowly as memories get smaller; the line of truncated text falls faster, because what is cut off is gone.
# Shuffled memory and closed book lie on the floor. The exact numbers are in the table above.*
#
# ## Is the difference real?
#
# Two intervals that overlap say little; the same questions asked twice say more. Paired differences of memory against
# text that is cut to the same budget, and against whole text:

# %%
for result in results:
    for pair in result["paired"]:
        if {pair["method"], pair["against"]} in ({"truncated", "memory"}, {"memory", "raw"}):
            low, high = pair["difference_95"]
            print(
                f"{result['name']}: {pair['method']} at {pair['rate']} against {pair['against']}: "
                f"{pair['difference']:+.2f} [{low:+.2f}, {high:+.2f}], p = {pair['p']:.3f}"
            )

# %% [markdown]
# ## Read before you believe
#
# Every prediction is in a file beside the figures. Some that text got right and memory at rate 4.6 did not:

# %%
lost = []
for result in results:
    answered = [
        json.loads(line) for line in (home / "results" / f"{result['name']}.jsonl").read_text().splitlines()[1:]
    ]
    by_cell = {(row["method"], row["rate"], row["id"]): row for row in answered}
    for (method, rate, id_), row in by_cell.items():
        text = by_cell["raw", 1.0, id_]
        if (method, rate) == ("memory", 4.6) and text["em"] and not row["em"]:
            lost.append((row["question"], text["prediction"], row["prediction"]))
for question, text, memory in lost[:6]:
    print(f"{question}\n    text: {text}    memory: {memory}")

# %% [markdown]
# ## The whole
#
# All questions instead of 40, at the command line; stopped, the same command goes on where it was:
#
# ```sh export VIST_RAG_DATA=my-data for name in nq_open triviaqa; do vist-rag eval --task qa --dataset $name --split
# dev --passages distant --output results \ --methods closed_book,raw,truncated,memory,shuffled_memory --rates
# 2.3,4.6,9 done vist-rag report results ```
#
# Passages that retrieval found, instead of those that hold an answer: `--passages bm25 --top-k 1,5,10`, or
# `--passages index` for your own index ([how to](../how-to/evaluate.md)).
#
# ## What this shows, and what it does not
#
# - Where on the curve you want to be is your choice: one stored memory is read at any size.
# - Forty questions make intervals some thirty points wide. They show the shape, and not whether two methods that lie
#   close differ. Figures on a thousand questions each, with trained baselines beside memory, are in [the
#   benchmarks](../benchmarks.md): there, text embeddings that are pooled at the same ratio answer as much as memory
#   does, or more.
# - Every question comes with a passage that answers it. What retrieval loses comes on top, in all methods alike.
# - The model is the small one of the package. The shape of the curve for your model is a question for your model.
