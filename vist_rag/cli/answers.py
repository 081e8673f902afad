"""How an answer looks: on the screen, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from vist_rag.cli.terminal import printable

if TYPE_CHECKING:
    from vist_rag.types import Answer, Citation, Usage


def answer_json(answer: Answer) -> dict[str, Any]:
    """An answer as JSON values."""
    usage = answer.usage
    return {
        "question": answer.question,
        "answer": answer.text,
        "citations": [
            {
                "id": c.passage.id,
                "title": c.passage.title,
                "source": c.passage.source,
                "score": round(c.score, 4),
                "mode": c.mode,
                "span": c.span,
                "quote": c.quote,
                "text": c.passage.text,
            }
            for c in answer.citations
        ],
        "usage": {
            "origin_tokens": usage.origin_tokens,
            "compressed_tokens": usage.compressed_tokens,
            "ratio": round(usage.ratio, 3),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "budget": usage.budget,
            "guarded": dict(usage.guarded),
        },
        "timings_ms": {stage: round(ms, 1) for stage, ms in answer.timings_ms.items()},
    }


def best_citation(answer: Answer) -> Citation | None:
    """The best passage in which the answer stands; None where it stands in none."""
    return next((c for c in answer.citations if c.span is not None), None)


def cited_sentence(citation: Citation) -> Text:
    """The sentence of the passage in which the answer stands, the answer highlighted; empty without one."""
    from vist_rag.retrieval.chunking import split_sentences

    if citation.span is None:
        return Text()
    text, (first, last) = citation.passage.text, citation.span
    touched = [(start, end) for start, end in split_sentences(text) if start < last and end > first]
    begin = min((start for start, _ in touched), default=first)
    sentence = Text(printable(text[begin : max((end for _, end in touched), default=last)]))
    sentence.stylize("bold green", first - begin, last - begin)
    return sentence


def titled(citation: Citation) -> str:
    """The name of a cited passage."""
    return printable(citation.passage.title or citation.passage.source or citation.passage.id)


def usage_line(usage: Usage, total_ms: float) -> str:
    """What an answer cost, in words."""
    limit = "" if usage.budget is None else f" of {usage.budget} allowed"
    return (
        f"passages: {usage.origin_tokens} tokens as text, {usage.compressed_tokens}{limit} as they were read, "
        f"ratio {usage.ratio:.2f}; {total_ms:.0f} ms"
    )
