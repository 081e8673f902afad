"""PassageIndex: a directory of passages that is searched by meaning and survives whatever happens to the process."""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from vist_rag import codec
from vist_rag.batching import MicroBatcher
from vist_rag.errors import ConfigError, InputError, ShapeError, StoreError
from vist_rag.retrieval.database import is_writable
from vist_rag.retrieval.embedder import DEFAULT_MODEL, Embedder, SentenceTransformerEmbedder
from vist_rag.retrieval.faiss_cache import FaissCache, new_index
from vist_rag.retrieval.store import Entry, PassageStore, Sizes
from vist_rag.types import Passage, SearchHit

MAX_QUESTION_CHARS = 20_000
"""Longest question that is searched for: what is longer is a document, and its vector would be that of its start."""

_BATCH = 256
"""Passages a transaction: what a kill can undo, against the cost of an fsync."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


_MISSING: Any = object()


class PassageIndex:
    """Passages with their vectors and memories, searched by cosine similarity.

    The store (``passages.sqlite``) is the truth; FAISS (``passages.faiss``) is a cache of its vectors. Any number of
    processes may read while one writes: a reader follows the writer at its next search. Thread-safe. Use
    :meth:`open`, and close it, or use it as a context manager, so that the cache is written.
    """

    def __init__(self, store: PassageStore, embedder: Embedder, cache: FaissCache) -> None:
        self.embedder = embedder
        self._store = store
        self._cache = cache

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        embedder: Embedder | None = None,
        index_factory: str | None = None,
        memory_form: str | None = None,
        read_only: bool = False,
    ) -> PassageIndex:
        """Open the index in a directory; make it where there is none.

        A directory that cannot be written is opened as ``read_only``. The embedder is not loaded before it is needed.

        Args:
            directory: Where the index lives.
            embedder: None is the one that the index was made with, all-MiniLM-L6-v2 for a new one.
            index_factory: A FAISS factory string; None is the one that the index was made with, ``Flat`` (exact) for a
                new one. Another one than before has the cache built anew.
            memory_form: How memories are stored from now on: one of :data:`vist_rag.codec.FORMS`; None is
                what was chosen before, else the form that is good for the compressor that makes them. Those that are
                stored stay as they are and are read as before; ``vist-rag reindex`` makes them anew.
            read_only: Never write; the index must exist.
        Raises:
            StoreError: If the index is missing (read-only), locked, damaged, of a newer version, or was made with
                another embedder, or if the directory cannot be made.
            ConfigError: If FAISS refuses ``index_factory``, or there is no such ``memory_form``.
        Warns:
            UserWarning: If the cache is missing, torn or older than the store, and was built anew.
        """
        directory = Path(directory)
        read_only = read_only or _made_or_found(directory)
        store = PassageStore(directory / "passages.sqlite", read_only=read_only)
        try:
            meta = store.meta()
            embedder = _matching(embedder, meta.get("embedder"), directory)
            if "embedder" not in meta:
                store.set_meta("embedder", embedder.name)
            made_with = meta.get("index_factory")
            factory = index_factory or made_with or "Flat"
            index = cls(store, embedder, FaissCache(directory / "passages.faiss", factory))
            if memory_form is not None:
                index.set_memory_form(memory_form)
            index._open_cache(factory_changed=made_with not in (None, factory))
        except BaseException:
            store.close()
            raise
        return index

    def _open_cache(self, *, factory_changed: bool) -> None:
        if factory_changed:
            new_index(self._cache.factory, int(self.meta["dimension"]))
        with self._store.snapshot():
            reason = self._cache.load(self._store)
            if reason is not None and len(self._store):
                if not factory_changed:
                    path = self._cache.path
                    warnings.warn(f"{path} {reason}; building it anew from the store, nothing is lost.", stacklevel=3)
                self._cache.refresh(self._store)
        if not self._store.read_only:
            if factory_changed:
                self._store.set_meta("index_factory", self._cache.factory)
            self._save_cache()

    def _save_cache(self) -> None:
        try:
            self._cache.save(self._store)
        except (OSError, StoreError) as error:
            warnings.warn(f"The FAISS cache was not written; the next opening builds it anew. {error}", stacklevel=3)

    def close(self) -> None:
        """Write the cache if it is outdated, and close the files; a second call does nothing."""
        try:
            if not self._store.closed and not self._store.read_only:
                self._save_cache()
        finally:
            self._store.close()

    def __enter__(self) -> PassageIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._store)

    def __bool__(self) -> bool:
        return True  # an empty index is an index: ``index or default`` must not drop it

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written here."""
        return self._store.read_only

    @property
    def meta(self) -> dict[str, str]:
        """What the index was made with: ``embedder``; after the first passage also ``dimension``, ``index_factory``."""
        return self._store.meta()

    @property
    def memory_form(self) -> str | None:
        """How memories are stored, where that was chosen; None: in the form that is good for their compressor."""
        return self.meta.get("memory_form")

    # ------------------------------------------------------------------------------------------------------- writing

    def add(
        self,
        passages: Iterable[Passage],
        memories: Iterable[ArrayLike | None] | None = None,
        *,
        vectors: Iterable[ArrayLike] | None = None,
        fingerprint: str = "",
        form: str | None = None,
        progress: bool = False,
    ) -> int:
        """Embed passages and store them, with their memories where given, one transaction for every 256.

        What is interrupted keeps the batches that were stored; repeating it goes on from there, since a passage that is
        stored with the same text is not embedded again. A passage with a known id and another text replaces it.

        Args:
            passages: Passages; read as they are needed.
            memories: float ``[n, d]`` for each passage, or None for one without; as many as passages.
            vectors: float ``[d]`` for each passage, of any length above 0; None: the embedder makes them. What is
                stored with another vector is stored anew; its memories go.
            fingerprint: Of the compressor that made the memories.
            form: How memories are stored where :attr:`memory_form` does not say; None: float16.
            progress: Whether to show a progress bar.
        Returns:
            How many passages are new or changed.
        Raises:
            ConfigError: If memories come without a fingerprint, or FAISS refuses the index factory.
            InputError: If there are more or fewer memories or vectors than passages, or one of them cannot be stored.
            ShapeError: If there is not one finite vector a text, all of the length of those stored.
            StoreError: If the index is read-only or locked.
        """
        if memories is not None and not fingerprint:
            raise ConfigError("fingerprint must name the compressor that made the memories, got ''; give it.")
        self._store.require_writable()
        added = 0
        with tqdm(desc="indexing", unit=" passages", disable=not progress, total=_length(passages)) as bar:
            entries = _zipped(passages, memories, vectors)
            while batch := list(islice(entries, _BATCH)):
                added += self._add_batch(batch, fingerprint, self.memory_form or form or codec.DEFAULT_FORM)
                bar.update(len(batch))
        return added

    def _add_batch(self, batch: Sequence[_Given], fingerprint: str, form: str) -> int:
        own = self._given_vectors(batch)
        moved = self._moved(own)
        unknown = [given for given in batch if given.passage.id in moved or not self._store.holds(given.passage)]
        vectors = np.zeros((0, 0), np.float32)
        if unknown and own:
            vectors = np.stack([own[given.passage.id] for given in unknown])
        elif unknown:
            vectors = self._embed([given.passage.content for given in unknown])
        found = {given.passage: vector for given, vector in zip(unknown, vectors, strict=True)}
        entries = [Entry(given.passage, found.get(given.passage), given.memory) for given in batch]
        with self._store.transaction():
            if unknown and "dimension" not in self.meta:
                dimension = vectors.shape[1]
                new_index(self._cache.factory, dimension)  # tells of a bad factory now, not after a night of indexing
                self._store.set_meta("dimension", str(dimension))
                self._store.set_meta("index_factory", self._cache.factory)
            self._check_dimension(vectors)
            self._store.delete(moved)  # a row never changes its vector
            return self._store.add(entries, fingerprint, form)

    def _given_vectors(self, batch: Sequence[_Given]) -> dict[str, NDArray[np.float32]]:
        """Vectors that were given, by passage id, of length 1; nothing where the embedder makes them."""
        if batch[0].vector is None:
            return {}
        vectors = _normalised(cast(Any, [given.vector for given in batch]), len(batch), "vectors")
        return {given.passage.id: vector for given, vector in zip(batch, vectors, strict=True)}

    def _moved(self, own: Mapping[str, NDArray[np.float32]]) -> set[str]:
        """Ids that are stored with another vector than the one that is given."""
        held = self._store.vectors_of(own)
        return {id_ for id_, vector in held.items() if vector.shape == own[id_].shape and vector @ own[id_] < 1 - 1e-6}

    def _embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Vectors of length 1, ``[n, d]``, so that their inner product is the cosine."""
        encoded = self.embedder.encode(texts, query=query)
        return _normalised(encoded, len(texts), f"The embedder {self.embedder.name!r}")

    def _check_dimension(self, vectors: NDArray[np.float32]) -> None:
        if len(vectors) and vectors.shape[1] != int(self.meta["dimension"]):
            raise ShapeError(
                f"Vectors in this index have length {self.meta['dimension']}, the embedder {self.embedder.name!r} gave "
                f"{vectors.shape[1]}; use the embedder that the index was made with, or another directory."
            )

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages and their memories, in one transaction; unknown ids are passed over.

        With a factory other than ``Flat`` the next search builds FAISS anew: delete many at a time.

        Returns:
            How many were deleted.
        Raises:
            StoreError: If the index is read-only or locked.
        """
        return self._store.delete(ids)

    def put_memories(
        self,
        memories: Mapping[str, ArrayLike],
        fingerprint: str,
        *,
        form: str | None = None,
        only_stored: bool = False,
    ) -> int:
        """Keep memories, in one transaction; those of the same text and compressor are replaced.

        Args:
            memories: float ``[n, d]`` by text (``Passage.content``). The text need not be that of a passage here: so
                memories are kept of passages that another database holds.
            fingerprint: Of the compressor that made them.
            form: How they are stored where :attr:`memory_form` does not say; None: float16.
            only_stored: Pass over texts that no passage here has (any more).
        Returns:
            How many were kept.
        Raises:
            InputError: If a memory is not ``[n, d]`` or not finite in float16.
            StoreError: If the index is read-only or locked.
        """
        form = self.memory_form or form or codec.DEFAULT_FORM
        return self._store.put_memories(memories, fingerprint, form=form, only_stored=only_stored)

    def set_memory_form(self, form: str) -> None:
        """Store memories in this form from now on; those that are stored are read as before.

        Args:
            form: One of :data:`vist_rag.codec.FORMS`.
        Raises:
            ConfigError: If there is no such form.
            StoreError: If the index is read-only or locked.
        """
        codec.check_form(form)
        if form != self.memory_form:
            self._store.set_meta("memory_form", form)

    def delete_memories(self, texts: Iterable[str] | None = None, *, fingerprint: str | None = None) -> int:
        """Delete memories, in one transaction: of texts, of a compressor, or of texts by a compressor.

        Returns:
            How many were deleted.
        Raises:
            ConfigError: If neither is given.
            StoreError: If the index is read-only or locked.
        """
        return self._store.delete_memories(texts, fingerprint=fingerprint)

    def compact(self) -> None:
        """Give what deleted passages left free back to the disk; needs as much free space as the store is large.

        Raises:
            StoreError: If the index is read-only or locked, or the disk is full.
        """
        self._store.compact()

    def rebuild(self) -> int:
        """Make everything that is derived from passages anew: SQLite's own indexes, FAISS; damaged memories go.

        Returns:
            How many damaged memories went; they are made again when they are next read, or by ``vist-rag reindex``.
        Raises:
            StoreError: If the index is read-only or locked, or passages themselves are damaged.
        """
        gone = self._store.mend()
        self._cache = FaissCache(self._cache.path, self._cache.factory)
        self._save_cache()
        return gone

    # ------------------------------------------------------------------------------------------------------- reading

    def search(self, query: str, top_k: int) -> list[SearchHit]:
        """The passages whose meaning is nearest to the query, best first.

        Args:
            query: A question, up to 20,000 characters.
            top_k: How many, up to the size of the index. An approximate factory may find fewer.
        Raises:
            InputError: If the query is empty or too long, or the index is empty.
            ConfigError: If ``top_k`` is out of range.
            ShapeError: If the embedder gives vectors of another length than those stored.
        """
        return self.search_batch([query], top_k)[0]

    async def asearch(self, query: str, top_k: int) -> list[SearchHit]:
        """As :meth:`search`; the event loop is free meanwhile, and searches at the same time share a pass."""
        _check_query(query)  # a wrong one is told before it waits
        return await asyncio.wrap_future(self._batcher.submit((query, top_k), key=top_k))

    @cached_property
    def _batcher(self) -> MicroBatcher[tuple[str, int], list[SearchHit]]:
        return MicroBatcher(lambda asked: self.search_batch([query for query, _ in asked], asked[0][1]))

    def search_batch(self, queries: Sequence[str], top_k: int) -> list[list[SearchHit]]:
        """As :meth:`search` for several queries at once: one pass of the embedder, one of FAISS."""
        for query in queries:
            _check_query(query)
        with self._fresh_cache(top_k):  # a wrong top_k is told before a model is loaded
            if not queries:
                return []
        return self._nearest(self._embed(queries, query=True), top_k, None)

    def search_vectors(
        self, vectors: ArrayLike, top_k: int, *, where: Callable[[Passage], bool] | None = None
    ) -> list[list[SearchHit]]:
        """As :meth:`search_batch`, for vectors.

        Args:
            vectors: float ``[q, d]``, of any length above 0.
            top_k: How many, up to the size of the index.
            where: Which passages count; the best ``top_k`` of these are found, wherever they rank among all.
        Raises:
            InputError: If the index is empty.
            ConfigError: If ``top_k`` is out of range.
            ShapeError: If these are not finite vectors of the length of those stored.
        """
        return self._nearest(_normalised(vectors, len(np.asarray(vectors)), "vectors"), top_k, where)

    def _nearest(
        self, vectors: NDArray[np.float32], top_k: int, where: Callable[[Passage], bool] | None
    ) -> list[list[SearchHit]]:
        with self._fresh_cache(top_k) as cache:
            self._check_dimension(vectors)
            wanted = top_k
            while True:
                scores, rows = cache.search(vectors, wanted)
                passages = self._store.get_rows({int(row) for row in rows.flat if row >= 0})
                kept = passages if where is None else {row: p for row, p in passages.items() if where(p)}
                found = [
                    [(kept[int(row)], float(score)) for row, score in zip(*one, strict=True) if int(row) in kept][
                        :top_k
                    ]
                    for one in zip(rows, scores, strict=True)
                ]
                if where is None or wanted >= len(cache) or all(len(hits) == top_k for hits in found):
                    break
                wanted = min(4 * wanted, len(cache))
        return [[SearchHit(passage, score, rank) for rank, (passage, score) in enumerate(hits)] for hits in found]

    @contextmanager
    def _fresh_cache(self, top_k: int) -> Iterator[FaissCache]:
        """The cache as of the present state of the store, which stands still within, alone with this thread."""
        with self._store.snapshot():
            self._cache.refresh(self._store)
            _check_top_k(top_k, len(self._cache))
            yield self._cache

    def vectors(self, ids: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Vectors by passage id, float32 ``[d]`` of length 1, in the order asked; unknown ids are absent."""
        return self._store.vectors_of(ids)

    def memories(self, texts: Iterable[str], fingerprint: str) -> dict[str, NDArray[np.float16]]:
        """Stored memories by text, float16 ``[n, d]``; those not stored under this fingerprint are absent."""
        return self._store.memories(texts, fingerprint)

    def fingerprints(self) -> dict[str, int]:
        """The compressor fingerprints that memories are stored under, each with their number."""
        return self._store.fingerprints()

    def get(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Passages by id, in the order asked; unknown ids are absent."""
        return self._store.get(ids)

    def passages(self, *, lacking: str | None = None) -> Iterator[Passage]:
        """All passages in the order they were added.

        Args:
            lacking: Only those without a memory of this fingerprint in :attr:`memory_form`.
        """
        return self._store.passages(lacking=lacking, form=self.memory_form)

    def count_lacking(self, fingerprint: str) -> int:
        """How many passages have no memory of this fingerprint in :attr:`memory_form`."""
        return self._store.count_lacking(fingerprint, self.memory_form)

    def sizes(self) -> Sizes:
        """Rows and bytes, by kind."""
        return self._store.sizes()

    def problems(self) -> list[str]:
        """What is wrong with the store and its cache; every row is read. Empty: nothing."""
        if found := self._store.problems():
            return found
        with self._store.snapshot():
            return self._cache.problems(self._store)


def _made_or_found(directory: Path) -> bool:
    """Make the directory, or find it; True where it cannot be written but holds an index to be read."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{directory} cannot be made: {error.strerror}; give a writable directory.") from error
    if is_writable(directory):
        return False
    if not (directory / "passages.sqlite").exists():
        raise StoreError(f"{directory} cannot be written and holds no index; give a writable directory.")
    return True


def _matching(embedder: Embedder | None, made_with: str | None, directory: Path) -> Embedder:
    if embedder is None:
        if made_with is not None and not _HUB_ID.fullmatch(made_with):
            raise StoreError(
                f"The index in {directory} was made with the embedder {made_with!r}, which is not a hub model; "
                "pass it as embedder=."
            )
        return SentenceTransformerEmbedder(made_with or DEFAULT_MODEL)
    if made_with not in (None, embedder.name):
        raise StoreError(
            f"The index in {directory} was made with the embedder {made_with!r}, got {embedder.name!r}; open it with "
            "the former, or index into another directory."
        )
    return embedder


class _Given(NamedTuple):
    """What is added; the vector is None where the embedder makes it."""

    passage: Passage
    memory: ArrayLike | None
    vector: ArrayLike | None


def _zipped(
    passages: Iterable[Passage],
    memories: Iterable[ArrayLike | None] | None,
    vectors: Iterable[ArrayLike] | None,
) -> Iterator[_Given]:
    beside = [values for values in (memories, vectors) if values is not None]
    for passage, *row in zip_longest(passages, *beside, fillvalue=_MISSING):
        if passage is _MISSING or any(value is _MISSING for value in row):
            raise InputError(
                "There are more passages than memories or vectors, or fewer; give one memory (or None) and one vector "
                "for each."
            )
        memory = row.pop(0) if memories is not None else None
        yield _Given(passage, memory, row.pop() if row else None)


def _normalised(vectors: ArrayLike, n: int, who: str) -> NDArray[np.float32]:
    """Vectors of length 1, float32 ``[n, d]``, so that their inner product is the cosine."""
    try:
        array = np.array(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{who} must give {n} vectors of one length, got {error}; correct it.") from error
    if array.ndim != 2 or len(array) != n or not array.shape[1] or not np.isfinite(array).all():
        raise ShapeError(f"{who} must give {n} finite vectors [n, d], got {list(array.shape)}; correct it.")
    array /= np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return array


def _length(passages: Iterable[Passage]) -> int | None:
    return len(passages) if isinstance(passages, Sequence) else None


def _check_query(query: str) -> None:
    if not isinstance(query, str):
        raise InputError(f"The question must be a string, got {type(query).__name__}; give its text.")
    if not query.strip():
        raise InputError("The question is empty; ask something.")
    if len(query) > MAX_QUESTION_CHARS:
        raise InputError(
            f"A question may have up to {MAX_QUESTION_CHARS:,} characters, got {len(query):,}; shorten it, or index "
            "the text and ask about that."
        )


def _check_top_k(top_k: int, size: int) -> None:
    if not size:
        raise InputError("The index is empty; add passages first.")
    if not 1 <= top_k <= size:
        raise ConfigError(
            f"top_k must be in 1..{size} (passages in this index), got {top_k}; lower top_k or add passages."
        )
