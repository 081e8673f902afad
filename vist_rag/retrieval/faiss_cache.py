"""FAISS over the vectors of a store: a cache, which may be lost at any moment and is made anew from the store."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from vist_rag.errors import ConfigError, StoreError
from vist_rag.retrieval.store import Generation, PassageStore

_TRAINING_VECTORS = 100_000
"""Vectors that a factory with centroids or codebooks is trained on: beyond this k-means gains little and takes long."""


class FaissCache:
    """An ``IndexIDMap2`` whose ids are the row numbers of the store, and the file that it is kept in.

    Beside the file lies a JSON file with the generation of the store that it was made from, its factory and its sha256.
    Both are written to a temporary file and renamed; what does not fit together is not used. Threads take turns by
    working within a snapshot or a transaction of the store.

    Args:
        path: The FAISS file.
        factory: A FAISS ``index_factory`` string.
    """

    def __init__(self, path: Path, factory: str) -> None:
        self.path = path
        self.factory = factory
        self.saved: Generation | None = None
        self._index: faiss.IndexIDMap2 | None = None
        self._generation: Generation | None = None

    def __len__(self) -> int:
        return 0 if self._index is None else int(self._index.ntotal)

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def load(self, store: PassageStore) -> str | None:
        """Read the file, if it holds the present generation of the store.

        Returns:
            None, or why it was not used: it is missing, torn, outdated, of another store or factory.
        """
        try:
            facts = json.loads(self._sidecar.read_bytes())
            kept = Generation(*facts["generation"])
            if facts["factory"] != self.factory:
                return f"is a {facts['factory']!r} index, not {self.factory!r}"
            if kept != store.generation:
                return "is older than the store" if kept.number < store.generation.number else "is of another store"
            with self.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    return "is torn or damaged"
            index = faiss.read_index(str(self.path))
            if not isinstance(index, faiss.IndexIDMap2):
                return f"is an {type(index).__name__}, not an IndexIDMap2"
        except FileNotFoundError:
            return "is missing"
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            return f"cannot be read ({error})"
        self._index, self._generation, self.saved = index, kept, kept
        return None

    def save(self, store: PassageStore) -> None:
        """Bring the cache up to date and write it. Other writers wait, so that no two of them mix their files.

        Raises:
            StoreError: If the store is read-only or locked.
            OSError: If the files cannot be written.
        """
        if self.saved == store.generation:
            return
        with store.transaction():
            self.refresh(store)
            if self._index is None or self._generation is None:
                return
            temporary = self.path.with_name(f"{self.path.name}.tmp")
            try:
                faiss.write_index(self._index, str(temporary))
            except RuntimeError as error:  # FAISS's word for a full disk and the like
                raise OSError(f"{temporary} cannot be written: {error}") from error
            with temporary.open("rb+") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            facts = {"generation": self._generation, "factory": self.factory, "sha256": digest}
            temporary.replace(self.path)
            temporary.write_text(json.dumps(facts), "utf-8")
            temporary.replace(self._sidecar)
            self.saved = self._generation

    def refresh(self, store: PassageStore) -> None:
        """Follow the store to its present generation: by the rows that came and went, or by building anew.

        Building anew is needed where the factory cannot remove vectors, and wise where more came than were there: what
        was trained on few vectors serves many badly.

        Raises:
            ConfigError: If FAISS refuses the factory string for these vectors.
        """
        generation = store.generation
        if generation == self._generation:
            return
        count = len(store)
        known = np.zeros(0, np.int64) if self._index is None else faiss.vector_to_array(self._index.id_map)
        # Nothing to look for where rows were only added since: a look at all of them takes long in a large store.
        removed = self._generation is not None and self._generation.number < store.last_removal
        gone = np.setdiff1d(known, store.rows()) if removed else known[:0]
        kept = len(known) - len(gone)
        if self._index is None or count > 2 * kept or (len(gone) and not self._can_remove):
            self._index = self._built(store)
        else:
            if len(gone):
                self._index.remove_ids(faiss.IDSelectorBatch(gone))
            # Row numbers only grow, so whatever is new lies above whatever is known.
            for added, vectors in store.vectors(after=int(known.max(initial=0))):
                self._index.add_with_ids(vectors, added)
        if len(self) != count:
            self._index = self._generation = None
            raise StoreError(
                f"{store.path} is damaged: {count:,} passages are counted and others are found; run vist-rag index "
                "--verify, then --rebuild."
            )
        self._generation = generation

    def problems(self, store: PassageStore) -> list[str]:
        """What differs between the index in memory and the vectors of the store. Empty: nothing."""
        self.refresh(store)
        rows = store.rows()
        known = np.zeros(0, np.int64) if self._index is None else faiss.vector_to_array(self._index.id_map)
        if not np.array_equal(np.sort(known), rows):
            return [f"{self.path.name} holds other rows than the store"]
        if not self._can_remove or self._index is None:  # codes of vectors, not the vectors themselves
            return []
        flat = faiss.downcast_index(self._index.index).reconstruct_n(0, len(known))
        place = {int(row): position for position, row in enumerate(known)}
        wrong = sum(
            not np.array_equal(flat[place[int(row)]], vector)
            for page, vectors in store.vectors()
            for row, vector in zip(page, vectors, strict=True)
        )
        return [f"{self.path.name} holds {wrong:,} vectors that are not the store's"] if wrong else []

    @property
    def _can_remove(self) -> bool:
        # IndexIDMap2 renumbers when it removes; only flat storage renumbers with it.
        return self._index is not None and isinstance(faiss.downcast_index(self._index.index), faiss.IndexFlat)

    def _built(self, store: PassageStore) -> faiss.IndexIDMap2 | None:
        index: faiss.IndexIDMap2 | None = None
        for rows, vectors in store.vectors():
            if index is None:
                index = new_index(self.factory, vectors.shape[1])
                if not index.is_trained:
                    self._train(index, store)
            index.add_with_ids(vectors, rows)
        return index

    def _train(self, index: faiss.IndexIDMap2, store: PassageStore) -> None:
        # Every so many vectors, since neighbours in a corpus are alike and its first rows stand only for themselves.
        step = -(-len(store) // _TRAINING_VECTORS)
        sample = np.concatenate([vectors[::step] for _, vectors in store.vectors()])
        try:
            index.train(sample)
        except RuntimeError as error:
            raise ConfigError(
                f"index_factory {self.factory!r} cannot be trained on {len(sample)} passages: {error}; use 'Flat', or "
                "a factory with fewer centroids."
            ) from error
        if (inverted := faiss.try_extract_index_ivf(index)) is not None:
            inverted.nprobe = max(8, inverted.nlist // 16)  # FAISS's own default, 1, loses too many neighbours

    def search(self, vectors: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest rows of each query, ``[q, d]`` -> scores float32 ``[q, top_k]`` and rows int64 ``[q, top_k]``.

        Best first; row -1 where an approximate index found fewer than ``top_k``, all of them in an empty one.
        """
        if self._index is None:
            shape = len(vectors), top_k
            return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        scores, rows = self._index.search(vectors, top_k)
        return scores, rows


def new_index(factory: str, dimension: int) -> faiss.IndexIDMap2:
    """An empty index for the inner product.

    Raises:
        ConfigError: If FAISS does not know the factory string, or it does not fit the dimension.
    """
    try:
        index = faiss.IndexIDMap2(faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT))
    except RuntimeError as error:
        raise ConfigError(
            f"index_factory must be a FAISS factory string for vectors of length {dimension}, such as 'Flat', "
            f"'HNSW32' or 'IVF64,Flat', got {factory!r} ({error}); correct it."
        ) from error
    return index
