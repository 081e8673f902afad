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
# # LlamaIndex: the same query engine, fewer tokens
#
# You have a `VectorStoreIndex` and a query engine. This notebook gives it an LLM that reads nodes as memory, and a
# postprocessor that says which. Nodes, retrievers and responses stay what they are.
#
# `pip install 'vist-rag[llama-index,offline]'`. Everything runs on a CPU, without network.

# %%
from tempfile import mkdtemp

import matplotlib.pyplot as plt
from llama_index.core import Document, StorageContext, VectorStoreIndex, get_response_synthesizer

from llama_index_vist import (
    VIST_QA_TEMPLATE,
    VistEmbedding,
    VistLLM,
    VistPostprocessor,
    VistSynthesizer,
    VistVectorStore,
    vist_prompt_helper,
)
from vist_rag import Budget

# %% [markdown]
# ## Some documents
#
# From the catalogue of a museum that we made up.

# %%
catalogue = """
The house
The museum of clocks in Tarn Bridge is housed in a former spinning mill. It was founded in 1954 by the
clockmaker Ada Perrin, who gave it her own collection of three hundred pieces and the cat that lived among them.

The tower clock
The oldest clock of the museum comes from the tower of Saint Brede. It has one hand only, weighs as much as a
cow, and was driven by stones until 1820. It is wound every morning by a pupil of the village school.

The night tour
On the first Saturday of the month the museum stays open until midnight. All clocks are set to strike twelve at
once, which takes four minutes. Earplugs are handed out at the door.

The river clock
The river clock in the cellar is moved by the stream that once drove the mill. It runs fast after rain. Visitors
are asked to set their watches by the sun instead.

The workshop
Repairs are done by Jonas Field on Tuesdays. He takes no money for watches that belonged to a grandparent, and
none at all from children.

The restaurant
The restaurant above the entrance is called the Slow Hand. Its dish of the day is pea soup, and meals are served
when the cuckoo says so.
"""
entries = [entry.split("\n", 1) for entry in catalogue.strip().split("\n\n")]
questions = [
    "Who founded the museum of clocks?",
    "Where does the oldest clock come from?",
    "Who does the repairs?",
    "What is the restaurant called?",
    "What is handed out at the door?",
]
documents = [Document(text=" ".join(text.split()), metadata={"title": title}) for title, text in entries]
index = VectorStoreIndex.from_documents(documents, embed_model=VistEmbedding())

# %% [markdown]
# ## Before: text
#
# `VistLLM()` is the small model of the package; `VistLLM(checkpoint="my-checkpoint")` loads yours. `VistSynthesizer`
# puts all nodes in one prompt and cuts nothing. `guard="off"` is for this demonstration: it lets every node be
# memory.

# %%
llm = VistLLM(guard="off")
reads = {"llm": llm, "similarity_top_k": 1, "response_synthesizer": VistSynthesizer(llm)}
before = index.as_query_engine(**reads)
print(before.query(questions[0]))

# %% [markdown]
# ## After: memory
#
# One postprocessor is added.

# %%
post = VistPostprocessor(llm=llm)
after = index.as_query_engine(**reads, node_postprocessors=[post])
response = after.query(questions[0])
print(response)
node = response.source_nodes[0]
print(round(node.score, 2), node.metadata["title"], node.metadata["vist_latents"], "positions:", node.text[:50], "...")

# %% [markdown]
# The node of the response has its original text, score and metadata, so that a citation is what it was. Two keys are
# new: `vist_ref`, under which its memory is read, and `vist_latents`, the positions that it takes.
#
# ## Both, on five questions

# %%
answers = {name: [engine.query(q) for q in questions] for name, engine in (("text", before), ("memory", after))}
for question, text, memory in zip(questions, *answers.values(), strict=True):
    print(f"{question:42}{text!s:22}{memory!s}")

# %% [markdown]
# What each node takes, as text and as memory. The postprocessor tells the second in the metadata; the first is
# counted with the model's own tokens. Below, every node is marked, and sizes are set side by side.

# %%
nodes = VistPostprocessor(llm=llm).postprocess_nodes(
    index.as_retriever(similarity_top_k=len(documents)).retrieve("museum")
)
nodes.sort(key=lambda one: len(one.text))
raw = [llm.reader.generator.count_tokens(one.text) for one in nodes]
latents = [one.metadata["vist_latents"] for one in nodes]
figure, axes = plt.subplots(figsize=(7.2, 3), layout="constrained")
axes.plot(raw, range(len(nodes)), "s", color="#6b6b6b", markersize=8, label="tokens as text")
axes.plot(latents, range(len(nodes)), "o", color="#0072b2", markersize=8, label="positions as memory")
axes.hlines(range(len(nodes)), latents, raw, color="#9a9a9a", linewidth=1, zorder=0)
axes.set_yticks(range(len(nodes)), [one.metadata["title"] for one in nodes])
axes.set(xlim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# *In words: a line for each of the six documents, from a round mark (positions as memory) on the left to a square
# mark (tokens as text) on the right. The square stands about three times as far out, for short and long documents
# alike.*
#
# ## Other response modes
#
# Modes such as `compact` join the texts of nodes and cut them anew. Our prompt helper keeps a marked passage whole
# while they do.

# %%
compact = get_response_synthesizer(
    llm=llm, response_mode="compact", text_qa_template=VIST_QA_TEMPLATE, prompt_helper=vist_prompt_helper(llm)
)
engine = index.as_query_engine(llm=llm, similarity_top_k=1, node_postprocessors=[post], response_synthesizer=compact)
print(engine.query(questions[3]))

# %% [markdown]
# ## A limit
#
# A `Budget` tells how many nodes are read which way, or how much they may take together: here three nodes in at most
# 60 positions. Nodes beyond a budget are left out.

# %%
tight = VistPostprocessor(llm=llm, budget=Budget(k_memory=3, tokens=60, policy="by_rank"))
three = tight.postprocess_nodes(index.as_retriever(similarity_top_k=3).retrieve(questions[1]))
print([one.metadata["vist_latents"] for one in three], "positions, and the frame around each")

# %% [markdown]
# ## A store that keeps memories
#
# `VistVectorStore` is on disk when `add` returns, and with an `llm` it makes memories while nodes are added, so that
# no question waits for the encoder.

# %%
store = VistVectorStore(mkdtemp(prefix="vist-rag-"), llm=llm)
context = StorageContext.from_defaults(vector_store=store)
kept = VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=VistEmbedding())
print(kept.as_query_engine(**reads, node_postprocessors=[post]).query(questions[2]))

# %% [markdown]
# ## What this shows, and what it does not
#
# - A postprocessor and an LLM are all that changes; nodes keep their text, scores and metadata, and other LLMs get
#   text.
# - A memory takes about a third of the positions of its text, whatever is asked, and the number is known ahead.
# - Five questions measure nothing. [Open-domain question answering](04_open_domain_qa.py) does, with intervals.
# - The embedded model answers single questions from passages. Chat engines need a checkpoint of your own over a chat
#   model ([Train your own](05_train_your_own.py)).
