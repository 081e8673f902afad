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
# # Train your own: a compressor for another generator
#
# A compressor is taught to *one* language model: the projector between them has to speak the words of that model.
# This notebook takes the compressor of the package, puts it in front of a model that has never met it, and teaches
# the two to work together, in a minute on a CPU.
#
# To fit into a minute the model is a toy: a Llama of two layers with random weights, which knows no language at all.
# So the task is one that a toy can learn, and that cannot be solved by heart. At the end stands the recipe for real
# models.
#
# `pip install 'vist-rag[train,offline]'`. Everything runs without network.

# %%
import json
import random
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vist_rag import Passage, VistGenerator, VistRAG
from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.config import FusionConfig
from vist_rag.evaluation import EvalQuestion, evaluate_conditions
from vist_rag.generation import SoftPromptFusion
from vist_rag.training.baselines import recipe_runs
from vist_rag.training.export import save_checkpoint
from vist_rag.training.plan import plan_runs
from vist_rag.training.recipe import load_recipe

torch.manual_seed(0)
home = Path(mkdtemp(prefix="vist-rag-"))

# %% [markdown]
# ## What is to be learned
#
# The register of an inn: who came, what they ate, on which day they left. Every combination is a page of its own, and
# the questions are the same for all pages. So nothing helps but reading: without the right memory, the best that a
# model can do is to guess a name of eight, a dish of eight, a day of seven. The last pages are kept aside, and never
# taught.

# %%
rng = random.Random(0)
asked = {
    "Who came?": ["Ada", "Boris", "Clara", "Dmitri", "Farid", "Greta", "Hugo", "Iris"],
    "What was eaten?": ["soup", "bread", "trout", "beans", "cheese", "lamb", "rice", "eggs"],
    "Which day?": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}
pages = list(product(*asked.values()))
rng.shuffle(pages)
texts = [f"{name} ate {dish} and left on {day}." for name, dish, day in pages]
rows = [
    {"question": question, "answers": [answer], "context": text}
    for text, page in zip(texts, pages, strict=True)
    for question, answer in zip(asked, page, strict=True)
]
held_out = 3 * 48
taught, unseen = rows[:-held_out], rows[-held_out:]
data = home / "data"
files = {"questions/inn.jsonl": taught, "passages/inn.jsonl": [{"text": text} for text in texts]}
for name, lines in files.items():
    (data / name).parent.mkdir(parents=True)
    (data / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
print(len(taught), "questions to learn from,", len(unseen), "on pages that are kept aside, such as:")
print(json.dumps(unseen[0], indent=1))

# %% [markdown]
# ## The other generator
#
# Any causal language model of transformers does, with its own tokenizer. Here both are made on the spot.

# %%
core = Tokenizer(models.WordLevel(unk_token="<unk>"))
core.normalizer = normalizers.Lowercase()
core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
written = [f"Document : {row['context']} Question: {row['question']} Answer:" for row in taught]
core.train_from_iterator(written, trainers.WordLevelTrainer(special_tokens=["<pad>", "<s>", "</s>", "<unk>"]))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
llama = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,  # words that differ from the start, since there is no time to drive them apart
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
)
print(f"{sum(weight.numel() for weight in llama.parameters()):,} weights, {len(tokenizer)} words")

# %% [markdown]
# ## Put together, untaught
#
# The compressor is the one of the package, ready-made and frozen: vision tower and resampler stay as they are.
# Between the two goes a fresh *soft prompt* fusion: a projector from latents to the embeddings of the new model. The
# checkpoint that this makes can be loaded and asked, and answers nonsense.

# %%
compressor = load_compressor(find_checkpoint(None), device="cpu")
fusion = SoftPromptFusion(FusionConfig(compressor.memory_width, 64, hidden_width=256))
fusion.match_scale(llama.get_input_embeddings().weight)
start = save_checkpoint(home / "start", compressor, VistGenerator(llama, tokenizer, fusion), int8=False)

# %% [markdown]
# ## The recipe
#
# A recipe is a TOML file. This one has two stages, both of kind `qa`: questions are answered from their page.
#
# 1. `school` gives the toy what a real model brings along, and no compressor runs: with `ideal = 1.0` it reads
#    memories that say exactly which words stand where.
# 2. `memory` shows it real ones. The generator is frozen, as a real one would be, and the projector learns.

# %%
recipe = home / "inn.toml"
recipe.write_text(f"""
seed = 0

[start]
checkpoint = "{start}"

[data.questions]
"questions/*.jsonl" = 1.0

[probe]
measure = false

[trainer]
logging_steps = 5
adam_beta2 = 0.95

[[stages]]
name = "school"
kind = "qa"
steps = 100
batch = 32
learning_rate = 3e-3
ideal = 1.0
train = ["generator", "embeddings", "boundaries"]

[[stages]]
name = "memory"
kind = "qa"
steps = 250
batch = 16
learning_rate = 3e-3
train = ["projector", "boundaries"]

[settings]
max_new_tokens = 3
budget = {{ k_raw = 0, k_memory = 1 }}
""")
(run,) = recipe_runs(load_recipe(recipe), data, home / "run")
model = run.run()
print(sorted(path.name for path in model.iterdir()))

# %% [markdown]
# The same at the command line: `vist-rag train inn.toml --data data --output run`. Stopped, the same command goes on
# where it was.
#
# ## The loss
#
# Every stage keeps a `log.jsonl`.

# %%
guess = sum(torch.log(torch.tensor(float(len(words)))) for words in asked.values()) / 3 / 2
figure, panels = plt.subplots(1, 2, figsize=(7.6, 3), sharey=True, layout="constrained")
for axes, stage in zip(panels, ("school", "memory"), strict=True):
    log = map(json.loads, (home / "run" / stage / "log.jsonl").read_text().splitlines())
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    axes.plot(*zip(*points, strict=True), "o-", color="#0072b2", markersize=4)
    axes.axhline(guess, color="#595959", linestyle="--")
    axes.set(title=f"stage: {stage}", xlabel="step", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("nats a token")
panels[0].text(panels[0].get_xlim()[1], guess, "guessing ", ha="right", va="bottom", color="#595959")
plt.show()

# %% [markdown]
# *In words: on the left, in school, the loss falls steeply, through the dashed line and on to nearly nothing. The
# dashed line is what a model reaches that guesses among the names, dishes and days without reading. On the right,
# with real memories, it begins high again, because the projector says nothing yet, and falls below the line as the
# projector learns the model's words.*
#
# ## Does it read?
#
# Pages that were never taught, from their memory and from the memory of *another* page. A model that reads must fail
# there; one that has learned pages by heart would not.

# %%
rag = VistRAG.from_pretrained(model, None, guard="off")
questions = [
    EvalQuestion(str(i), row["question"], tuple(row["answers"]), (Passage(row["context"]),))
    for i, row in enumerate(unseen)
]
conditions = ("memory", "shuffled_memory")
result = evaluate_conditions(
    rag.compressor, rag.generator, questions, conditions=conditions, template=rag.template, max_new_tokens=3
)
for name in conditions:
    figures = result["figures"][name]
    print(f"{name:18}{figures['em']:.2f}  {figures['em_95']}")

# %%
looks = {"memory": ("#0072b2", ""), "shuffled_memory": ("#7a7a7a", "//")}
figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
for place, name in enumerate(conditions):
    shares = [
        sum(row["em"] for row in result["rows"] if row["condition"] == name and row["question"] == question) / 48
        for question in asked
    ]
    spots = [i + 0.3 * (place - 0.5) for i in range(3)]
    colour, hatch = looks[name]
    axes.bar(spots, shares, 0.28, color=colour, hatch=hatch, edgecolor="white", label=name.replace("_", " "))
for i, words in enumerate(asked.values()):
    axes.hlines(1 / len(words), i - 0.42, i + 0.42, color="#1a1a1a", linestyle="--", label="" if i else "guessing")
axes.set_xticks(range(3), asked)
axes.set(ylabel="exact match", ylim=(0, 1.05))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# *In words: two bars for each of the three questions. The bar for memory is by far the higher one; that for shuffled
# memory stays near the dashed line of guessing, or below it.*
#
# ## Real models
#
# What changes for a real pair is the recipe. `tinyllama-clip` teaches a resampler between CLIP ViT-L/14 and TinyLlama
# 1.1B, both frozen. `--dry-run` tells what that takes before anything is trained, from the *sizes* of the models
# alone. Without network there are no sizes to read, so here they are written down by hand, and the tokenizer is ours:
# parameters are those of the real pair, and numbers of tokens are not.

# %%
vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
CLIPConfig(vision_config={**vision, "image_size": 224, "patch_size": 14}).save_pretrained(home / "clip")
LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
    vocab_size=32000, max_position_embeddings=2048,
).save_pretrained(home / "tinyllama")  # fmt: skip
tokenizer.save_pretrained(home / "tinyllama")
sizes = [f'tower.pretrained="{home}/clip"', f'generator.pretrained="{home}/tinyllama"']
(plan,) = plan_runs(recipe_runs(load_recipe("tinyllama-clip", sizes), data, home / "plan"))
print(f"{'stage':10}{'steps':>7}{'trained':>12}{'frozen':>14}{'FLOPs':>10}{'memory':>10}")
for stage in plan.stages:
    trained, frozen = (sum(getattr(p, kind) for p in stage.parameters.values()) for kind in ("trained", "frozen"))
    flops = stage.all_flops.forward + stage.all_flops.backward
    print(
        f"{stage.name:10}{stage.steps:7,}{trained / 1e6:10.1f} M{frozen / 1e6:12.1f} M{flops:10.1e}"
        f"{stage.memory.total / 1e9:7.1f} GB"
    )

# %% [markdown]
# At the command line, with network: `vist-rag train tinyllama-clip --data DIR --dry-run`, which also says how many
# hours that is on your device. Then the same without `--dry-run`, with `--output`. Your own pair is a copy of that
# recipe with two other names in it ([how to](../how-to/train.md)).
#
# ## What this shows, and what it does not
#
# - A compressor that is ready works for a generator that it has never met: in the second stage only what stands
#   between them was taught, and the memories of an index can stay.
# - The control says that it reads: with another page's memory the answers are those of someone who guesses.
# - It does not show that real models learn this in a minute. The toy has one kind of sentence and some forty words,
#   and learned all of its weights; a real generator brings language along, and takes hours on a GPU. No pair of full
#   size has been trained by the authors of this package; [the paper's figures](../explanation/method.md) are for its
#   own.
# - It also does not show that memory is as good as text: nothing here was read as text. For that, see [Open-domain
#   question answering](04_open_domain_qa.py).
