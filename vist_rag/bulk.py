"""Many machines: passages -> Parquet parts with vectors and memories, made by a pool of Ray workers -> the index.

A part is a Parquet file that is named by the hash of what it is made from: passages, embedder, compressor. So a part
that is there is finished, whoever made it and when, and a command that is repeated makes what is missing. A worker is
given names, never data: it reads a staged file of passages, and writes its part under a temporary name that is renamed
at the end. A worker that dies costs the part that it was at; a machine that comes back finds the others done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vist_rag.errors import CheckpointError, ConfigError, InputError, MissingDependencyError, StoreError, VistError
from vist_rag.types import Passage

if TYPE_CHECKING:
    from vist_rag.compression import VistCompressor
    from vist_rag.retrieval import Embedder, PassageIndex

FORMAT = "vist-rag-part/1"
PART_PASSAGES = 1024
"""Passages a part, about: what the death of a worker can undo, against the number of files."""

_STORE_BYTES = 100 * 2**20
"""Ray's object store on a machine of our own: names of parts travel through it, nothing else."""

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else it warns that Ray Data's own way to start a worker hinders a restart
}
"""Where it is not set: nothing is reported to anybody, and progress is ours to show."""

_MOST_BLOCKS = 10_000  # Ray Data keeps a record of each


# ---------------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True, slots=True)
class Part:
    """Some passages that are made and stored together.

    Attributes:
        key: Hash of the passages, the embedder and the compressor; the name of the part's file.
        passages: How many.
        state: ``held``: the index has all of it. ``kept``: its file is there. ``missing``: it is to be made.
    """

    key: str
    passages: int
    state: Literal["held", "kept", "missing"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What parts are made with: names that every machine resolves for itself.

    Attributes:
        embedder: A sentence-transformers model, by hub id or directory.
        checkpoint: Where the compressor is; None: the one that comes with this package.
        fingerprint: Of the compressor; empty: no memories are made.
    """

    embedder: str
    checkpoint: str | None = None
    fingerprint: str = ""

    def load(self) -> tuple[Embedder, VistCompressor | None]:
        """The models, on the best device of this machine.

        Raises:
            CheckpointError: If this machine finds another compressor under that name.
        """
        from vist_rag.checkpoint import find_checkpoint, load_compressor
        from vist_rag.retrieval import SentenceTransformerEmbedder

        embedder = SentenceTransformerEmbedder(self.embedder)
        if not self.fingerprint:
            return embedder, None
        compressor: Any = load_compressor(find_checkpoint(self.checkpoint))
        if compressor.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"The checkpoint {self.checkpoint or 'of this package'} must have the fingerprint "
                f"{self.fingerprint[:12]} on every machine, got {compressor.fingerprint[:12]} on "
                f"{socket.gethostname()}; copy the same files there."
            )
        return embedder, compressor

    def key(self, passages: Sequence[Passage]) -> str:
        """The name of the part of these passages."""
        sha = hashlib.sha256(json.dumps([FORMAT, self.embedder, self.fingerprint]).encode())
        for passage in passages:
            sha.update(_row(passage).encode())
        return sha.hexdigest()[:32]


def cut(passages: Iterable[Passage], size: int = PART_PASSAGES) -> Iterator[list[Passage]]:
    """Passages in parts of about ``size``, twice that at most.

    Where a part ends is decided by the passage that ends it: what is changed, added or taken away in a corpus changes
    the part around it and leaves the others as they were.
    """
    least = max(1, size // 2)
    part: list[Passage] = []
    for passage in passages:
        part.append(passage)
        ends = zlib.crc32(passage.id.encode("utf-8", "surrogatepass")) % least == 0
        if len(part) >= 2 * size or (ends and len(part) >= least):
            yield part
            part = []
    if part:
        yield part


def _row(passage: Passage) -> str:
    """A passage as a line of JSON, which holds any code point."""
    fields = [passage.id, passage.title, passage.text, passage.source, dict(passage.metadata)]
    return json.dumps(fields, sort_keys=True, allow_nan=False) + "\n"


# ----------------------------------------------------------------------------------------------------- the directory


class Parts:
    """Parts in a directory that all machines see.

    Args:
        directory: Made where it is missing.
        recipe: What the parts are made with.
        size: Passages a part.
    Raises:
        ConfigError: If ``size`` is out of range.
        MissingDependencyError: If pyarrow is not installed.
    """

    def __init__(self, directory: str | Path, recipe: Recipe, size: int = PART_PASSAGES) -> None:
        if size < 1:
            raise ConfigError(f"size must be 1 or more passages, got {size}.")
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingDependencyError("A Parquet file", "pyarrow", "ray") from error
        self.directory = Path(directory).absolute()
        self.recipe = recipe
        self.size = size
        self._parquet = pyarrow.parquet

    @property
    def _staged(self) -> Path:
        return self.directory / "staged"

    def path(self, key: str) -> Path:
        """Where a part is, or will be."""
        return self.directory / f"part-{key}.parquet"

    def plan(self, passages: Iterable[Passage], index: PassageIndex | None = None) -> list[Part]:
        """Cut passages into parts, and stage those that are to be made.

        Args:
            passages: The corpus; read once, a part at a time.
            index: Where the parts will go; a part that it holds, memories included, is not made. None: every part is.
        Raises:
            StoreError: If the directory cannot be written.
        """
        begun = [path for path in (self.directory.parent, self.directory) if not path.exists()]
        try:
            return [self._planned(part, index) for part in cut(passages, self.size)]
        except BaseException:
            # A corpus that cannot be read leaves nothing behind.
            shutil.rmtree(self._staged, ignore_errors=True)
            with suppress(OSError):
                for path in reversed(begun):
                    path.rmdir()
            raise

    def _planned(self, passages: Sequence[Passage], index: PassageIndex | None) -> Part:
        key = self.recipe.key(passages)
        if index is not None and _holds(index, passages, self.recipe.fingerprint):
            return Part(key, len(passages), "held")
        if self.finished(key, len(passages)):
            return Part(key, len(passages), "kept")
        try:
            self._staged.mkdir(parents=True, exist_ok=True)
            _write(self._staged / f"{key}.jsonl", lambda path: path.write_text("".join(map(_row, passages)), "utf-8"))
        except OSError as error:
            raise StoreError(f"{self.directory} cannot be written: {error.strerror}; give a writable one.") from error
        return Part(key, len(passages), "missing")

    def finished(self, key: str, passages: int) -> bool:
        """Whether a part is there, whole, and what its name says."""
        try:
            facts = self._parquet.read_metadata(self.path(key))
        except (OSError, ValueError):  # not there, or torn: pyarrow's ArrowInvalid is a ValueError
            return False
        return facts.num_rows == passages and (facts.metadata or {}).get(b"vist_rag.key") == key.encode()

    def make(self, key: str, embedder: Embedder, compressor: VistCompressor | None) -> None:
        """Make a part that was staged; one that is there already is left alone.

        Raises:
            StoreError: If it was not staged here.
        """
        staged = self._staged / f"{key}.jsonl"
        try:
            rows = [json.loads(line) for line in staged.read_text("utf-8").splitlines()]
        except FileNotFoundError as error:
            if self.path(key).exists():  # made by a worker that died before it could say so
                return
            raise StoreError(
                f"{socket.gethostname()} does not find {staged}; the directory must be one that all machines share."
            ) from error
        if not self.finished(key, len(rows)):
            passages = [Passage(text, id_, title, source, metadata) for id_, title, text, source, metadata in rows]
            table = self._table(key, passages, embedder, compressor)
            _write(self.path(key), lambda path: self._parquet.write_table(table, path, write_page_checksum=True))
        staged.unlink(missing_ok=True)

    def _table(
        self, key: str, passages: Sequence[Passage], embedder: Embedder, compressor: VistCompressor | None
    ) -> Any:
        import pyarrow as pa

        from vist_rag.pipeline import compress

        texts = [passage.content for passage in passages]
        vectors = np.asarray(embedder.encode(texts), np.float32)
        columns: dict[str, Any] = {
            name: pa.array([_sound(getattr(passage, name)) for passage in passages], pa.string())
            for name in ("id", "title", "text", "source")
        }
        columns["metadata"] = [json.dumps(dict(passage.metadata), allow_nan=False) for passage in passages]
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        if compressor is not None:
            made = compress(compressor, texts)
            memories = [np.ascontiguousarray(made[text], "<f2") for text in texts]
            columns["memory"] = pa.array([memory.tobytes() for memory in memories], pa.binary())
            columns["n"] = pa.array([memory.shape[0] for memory in memories], pa.int32())
            columns["d"] = pa.array([memory.shape[1] for memory in memories], pa.int32())
            columns["fingerprint"] = pa.array([self.recipe.fingerprint] * len(passages), pa.string())
            columns["coverage"] = pa.array(compressor.renderer.render(texts).coverage.tolist(), pa.float32())
        facts = {"vist_rag.format": FORMAT, "vist_rag.key": key, "vist_rag.embedder": self.recipe.embedder}
        return pa.table(columns).replace_schema_metadata(facts)

    def read(self, key: str) -> Made:
        """A part that was made.

        Raises:
            StoreError: If it is missing or damaged.
        """
        path = self.path(key)
        try:
            table = self._parquet.read_table(path, page_checksum_verification=True, partitioning=None)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it, and repeat the command.") from error
        return Made(table)

    def again(self, plan: Sequence[Part], passages: Iterable[Passage]) -> Iterator[tuple[Part, list[Passage]]]:
        """Each part beside its passages, from the corpus read once more.

        Raises:
            InputError: If the corpus has changed since it was planned.
        """
        for part, some in zip_longest(plan, cut(passages, self.size)):
            if part is None or some is None or self.recipe.key(some) != part.key:
                raise InputError("The files have changed since they were read; repeat the command.")
            yield part, some

    def merge(
        self, part: Part, passages: Sequence[Passage], index: PassageIndex, *, keep: bool, form: str | None = None
    ) -> tuple[int, dict[str, float]]:
        """Store a part in an index; what is stored already is not written again.

        Args:
            part: As planned.
            passages: Those of the part.
            index: Where to.
            keep: Whether the file stays.
            form: How memories are stored where the index does not say.
        Returns:
            How many passages are new or changed, and the coverage by passage id, where it is known.
        Raises:
            StoreError: If the part is missing or damaged, or the index cannot be written.
        """
        if part.state == "held":
            return index.add(passages), {}  # what is around the texts may have changed
        made, fingerprint = self.read(part.key), self.recipe.fingerprint
        memories = None
        if fingerprint:
            known = index.memories([passage.content for passage in passages], fingerprint)
            memories = [
                None if passage.content in known else memory
                for passage, memory in zip(passages, made.memories, strict=True)
            ]
        added = index.add(passages, memories, vectors=made.vectors, fingerprint=fingerprint, form=form)
        if not keep:
            self.path(part.key).unlink(missing_ok=True)
        return added, dict(zip((p.id for p in passages), made.coverage, strict=False))

    def others(self, plan: Sequence[Part]) -> list[Path]:
        """Parts in the directory that are not of this plan."""
        own = {self.path(part.key) for part in plan}
        return sorted(path for path in self.directory.glob("part-*.parquet") if path not in own)

    def tidy(self) -> None:
        """Remove what dead workers left, once all parts are made, and the directory where nothing is in it."""
        shutil.rmtree(self._staged, ignore_errors=True)
        for path in self.directory.glob("*.tmp"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()


class Made:
    """What was made of a part: rows in the order of its passages."""

    def __init__(self, table: Any) -> None:
        self._table = table

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """float32 ``[passages, d]``."""
        column = self._table.column("vector").combine_chunks()
        return np.asarray(column.flatten().to_numpy(), np.float32).reshape(len(column), -1)

    @cached_property
    def memories(self) -> list[NDArray[np.float16]]:
        """float16 ``[n, d]`` each."""
        rows = self._table.select(["memory", "n", "d"]).to_pylist()
        return [np.frombuffer(row["memory"], "<f2").reshape(row["n"], row["d"]).astype(np.float16) for row in rows]

    @property
    def coverage(self) -> list[float]:
        """Share of each passage's characters that the model has glyphs for; empty where no memory was made."""
        return self._table.column("coverage").to_pylist() if "coverage" in self._table.column_names else []


def _holds(index: PassageIndex, passages: Sequence[Passage], fingerprint: str) -> bool:
    """Whether an index has the very texts of all passages, with their memories where there is a fingerprint."""
    known = index.get([passage.id for passage in passages])
    if any(id_ not in known or known[id_].content != text for id_, text in ((p.id, p.content) for p in passages)):
        return False
    texts = {passage.content for passage in passages}
    return not fingerprint or len(index.memories(texts, fingerprint)) == len(texts)


def _sound(text: str) -> str:
    """Lone surrogates, which UTF-8 has no place for, as U+FFFD: for Parquet alone, the index takes the text itself."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a name of its own, and rename it when it is on the disk: it is there whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- the workers


def make_with_ray(
    parts: Parts,
    plan: Sequence[Part],
    *,
    workers: int | None = None,
    address: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Make the parts of a plan that are missing, on a pool of Ray workers that load their models once.

    A worker that dies is started again, and its part made anew, here or elsewhere.

    Args:
        parts: Where they go: a directory that all machines see.
        plan: Of :meth:`Parts.plan`.
        workers: How many; None: one a GPU where the cluster has any, else one a CPU.
        address: Of a Ray cluster; None: a cluster of this machine alone, for as long as this takes.
        advance: Called with the passages of each part that is there.
    Raises:
        ConfigError: If there is no cluster at the address, or ``workers`` is out of range.
        MissingDependencyError: If Ray is not installed.
        StoreError: If the directory is not one that all machines see, or a worker cannot make a part.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be 1 or more, got {workers}.")
    missing = [{"key": part.key, "passages": part.passages} for part in plan if part.state == "missing"]
    if missing:
        with _cluster(address, workers) as ray:
            items = ray.data.from_items(missing, override_num_blocks=min(len(missing), _MOST_BLOCKS))
            done = items.map_batches(
                _Worker,
                fn_constructor_args=(parts.directory, parts.recipe),
                batch_size=1,
                **_pool(ray, workers, len(missing)),
            )
            for row in done.iter_rows():
                if row["error"]:
                    raise StoreError(row["error"])
                advance(int(row["passages"]))
    for part in plan:
        if part.state == "missing" and not parts.finished(part.key, part.passages):
            raise StoreError(
                f"{parts.path(part.key)} was made and is not there; the directory must be one that all machines share."
            )


class _Worker:
    """One process with its models, for as long as there is work."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self._parts = Parts(directory, recipe)

    @cached_property
    def _models(self) -> tuple[Embedder, VistCompressor | None]:
        return self._parts.recipe.load()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
        error = ""
        try:
            for key in batch["key"].tolist():
                self._parts.make(key, *self._models)
        except VistError as raised:  # as a value: what Ray carries out of a worker has lost its cause
            error = str(raised)
        return batch | {"error": np.array([error] * len(batch["key"]))}


def _pool(ray: Any, workers: int | None, parts: int) -> dict[str, Any]:
    """Which workers there are: one a GPU, else one a CPU; never more than parts."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    size = max(1, min(workers or gpus or cpus, parts))
    # One task at a time: a part that waits at a worker that is busy, or dies, could be made elsewhere.
    pool = {"compute": ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)}
    return pool | ({"num_gpus": min(1.0, gpus / size)} if gpus else {"num_cpus": max(1, cpus // size)})


def require_ray() -> Any:
    """Ray, where it is installed.

    Raises:
        MissingDependencyError: If it is not.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("The engine ray", "ray", "ray") from error
    return ray


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    """Ray, quiet: the cluster that this process is in already, one at an address, or one of our own."""
    ray = require_ray()
    ours = not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        own = {"num_cpus": workers or os.cpu_count(), "object_store_memory": _STORE_BYTES, "include_dashboard": False}
        try:
            ray.init(address, logging_level="ERROR", log_to_driver=False, **(own if address == "local" else {}))
        except ConnectionError as error:
            raise ConfigError(
                f"There is no Ray cluster at {address!r}; start one (ray start --head), or leave --ray-address out."
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


__all__ = ["FORMAT", "PART_PASSAGES", "Part", "Parts", "Recipe", "cut", "make_with_ray", "require_ray"]
