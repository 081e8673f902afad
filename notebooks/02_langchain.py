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
# # LangChain: the same chain, fewer tokens
#
# You have a chain: a retriever finds documents, their text goes into a prompt, a model answers. This notebook puts
# one object between retriever and prompt, and the model reads the documents as memory. The retriever, the prompt's
# words and the way you call the chain stay.
#
# `pip install 'vist-rag[langchain,offline]'`. Everything runs on a CPU, without network.

# %%
from tempfile import mkdtemp

import matplotlib.pyplot as plt
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_vist import (
    VIST_PROMPT,
    ChatVist,
    VistDocumentCompressor,
    VistEmbeddings,
    VistVectorStore,
    readable,
    with_query,
)
from vist_rag import Budget

# %% [markdown]
# ## Some documents
#
# From the handbook of an observatory that we made up.

# %%
handbook = """
The observatory on Mount Calder was opened in 1931 by Vera Varga. It stands at 2,140 metres, above the clouds
for two hundred nights a year, and can be reached by a cable car that was built for a copper mine.

The large telescope of Mount Calder has a mirror of 90 centimetres. It was ground by hand in the valley below,
where the workshop can still be visited. The mirror is washed with distilled water every spring.

Guests are welcome on Fridays from eight in the evening until midnight. Torches must be red, since white light
blinds everyone for a quarter of an hour. Whoever forgets this pays for a round of cocoa.

The library of the observatory holds nine thousand glass plates. The oldest shows the comet of 1932, which Vera
Varga found while she was looking for a lost dog with a pair of field glasses.

The kitchen is run by Tomas Brell, who bakes rye bread at three in the morning, when observers are hungriest.
Soup is free for those who have stayed out past two.

Storms are announced by a siren on the cable car's upper station. Observers close the dome, take the plates
inside and wait in the cellar, where there is a piano.
"""
texts = [" ".join(text.split()) for text in handbook.strip().split("\n\n")]
questions = [
    "Who opened the observatory on Mount Calder?",
    "How large is the mirror of the telescope?",
    "On which day are guests welcome?",
    "Who runs the kitchen?",
    "What is on the upper station of the cable car?",
]
retriever = InMemoryVectorStore.from_texts(texts, VistEmbeddings()).as_retriever(search_kwargs={"k": 1})

# %% [markdown]
# ## Before: text
#
# A chain as it stands in many programs. The model is `ChatVist`: a chat model with open weights, here the small one
# of the package (`ChatVist("my-checkpoint")` loads yours). `guard="off"` is for this demonstration: it lets every
# document be memory.

# %%
llm = ChatVist(guard="off")
prompt = ChatPromptTemplate.from_template("{context}\nQuestion: {query}\nAnswer:")
context = retriever | (lambda documents: "\n".join(document.page_content for document in documents))
before = {"context": context, "query": RunnablePassthrough()} | prompt | llm
message = before.invoke(questions[0])
print(message.content, message.usage_metadata["input_tokens"])

# %% [markdown]
# ## After: memory
#
# `with_query` keeps the question beside the documents, the compressor decides how each is read, and `VIST_PROMPT`
# writes both in the words that the recipes of this package train with.

# %%
after = with_query(retriever) | VistDocumentCompressor(llm=llm) | VIST_PROMPT | llm
message = after.invoke(questions[0])
print(message.content, message.usage_metadata["input_tokens"], message.usage_metadata["input_token_details"])

# %% [markdown]
# What travels through the chain is the document as it was. Two keys of its metadata are new: under which reference
# its memory is read, and how many positions that takes. They are text and numbers, so they survive tracing,
# checkpoints and JSON.

# %%
document = (with_query(retriever) | VistDocumentCompressor(llm=llm)).invoke(questions[0])["documents"][0]
print(document.page_content[:68], "...")
print({key: document.metadata[key] for key in ("vist_ref", "vist_latents")})

# %% [markdown]
# ## Both, on five questions
#
# `batch` sends all of them through the model in one pass.

# %%
replies = {"text": before.batch(questions), "memory": after.batch(questions)}
for question, text, memory in zip(questions, *replies.values(), strict=True):
    print(f"{question:50}{text.content:36}{memory.content}")

# %%
places = range(len(questions))
tokens = {name: [reply.usage_metadata["input_tokens"] for reply in some] for name, some in replies.items()}
figure, axes = plt.subplots(figsize=(7.2, 3), layout="constrained")
axes.barh([p - 0.2 for p in places], tokens["text"], 0.38, color="#6b6b6b", label="documents as text")
axes.barh(
    [p + 0.2 for p in places], tokens["memory"], 0.38, color="#0072b2", hatch="//", edgecolor="white", label="as memory"
)
for bars in axes.containers:
    axes.bar_label(bars, padding=3)
axes.set_yticks(places, questions)
axes.invert_yaxis()
axes.spines[["top", "right"]].set_visible(False)
axes.set(xlabel="positions of the whole prompt, question included", xlim=(0, 1.1 * max(tokens["text"])))
figure.legend(loc="outside upper center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# *In words: two bars for each of the five questions. The one for memory is about half as long as the one for text,
# each time: the question itself and the words around it cost the same in both.*
#
# ## Memories that are ready
#
# Above, a memory was made when its document was first found. `VistVectorStore` makes it when the document is added
# and keeps both on disk, so that a question never waits for the encoder. It takes filters, deletes, and maximal
# marginal relevance as other stores do.

# %%
store = VistVectorStore(directory=mkdtemp(prefix="vist-rag-"), llm=llm)
store.add_texts(texts)
ready = with_query(store.as_retriever(search_kwargs={"k": 1})) | VistDocumentCompressor(llm=llm) | VIST_PROMPT | llm
print(ready.invoke("Who found the comet of 1932?").content)

# %% [markdown]
# ## A limit
#
# A `Budget` tells the compressor how many documents are read which way, or how much they may take together. Three
# documents in at most 60 positions:

# %%
three = store.as_retriever(search_kwargs={"k": 3})
tight = VistDocumentCompressor(llm=llm, budget=Budget(k_memory=3, tokens=60, policy="by_rank"))
found = (with_query(three) | tight).invoke(questions[1])["documents"]
print([document.metadata["vist_latents"] for document in found], "positions, and the frame around each")

# %% [markdown]
# ## Another model in the chain
#
# A model that cannot read memory never sees a marker: the compressor recognises it, gives it the text, and warns
# once. Where ours comes first and another is the fallback, `readable` takes the markers out.

# %%
other = FakeListChatModel(responses=["I am another model, and I was given text."])
chain = with_query(retriever) | VistDocumentCompressor(llm=llm) | VIST_PROMPT | (readable | other)
print(chain.invoke(questions[0]).content)

# %% [markdown]
# ## What this shows, and what it does not
#
# - One object is added to a chain; documents keep their text, ids, scores and metadata, so citations go on working.
# - `usage_metadata` counts what was read, and tells memory from text.
# - Five questions measure nothing. [Open-domain question answering](04_open_domain_qa.py) does, with intervals.
# - The embedded model answers single questions from passages. Agents and conversations need a checkpoint of your own
#   over a chat model ([Train your own](05_train_your_own.py)).
