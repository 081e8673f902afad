"""A smaller vocabulary for a WordPiece model: what a tiny generator can learn to write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, models

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def prune_vocabulary(tokenizer: Tokenizer, texts: Iterable[list[str]], size: int) -> tuple[Tokenizer, list[int]]:
    """Keep the most frequent word pieces; rarer words are spelt in smaller ones.

    Special tokens and single characters are always kept, so that every text the old vocabulary could write, the new one
    can.

    Args:
        tokenizer: A WordPiece tokenizer.
        texts: Batches of text to count pieces in.
        size: Pieces to keep.
    Returns:
        The new tokenizer, and the old id of each new piece.
    """
    counts: Counter[int] = Counter()
    for batch in texts:
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    kept = {i for i, piece in pieces.items() if piece in _SPECIAL or len(piece.removeprefix("##")) == 1}
    # Ties in the order of the old vocabulary, so that the same counts give the same pieces.
    for i, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) >= size:
            break
        kept.add(i)
    old_ids = sorted(kept)
    pruned = Tokenizer.from_str(tokenizer.to_str())
    pruned.model = models.WordPiece(
        {pieces[i]: new for new, i in enumerate(old_ids)}, unk_token="[UNK]", max_input_chars_per_word=100
    )
    return pruned, old_ids
