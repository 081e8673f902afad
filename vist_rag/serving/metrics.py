"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from vist_rag.types import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one application, in a registry of their own.

    Attributes:
        requests: Chat completions, by HTTP status; 499: the client left before there was one.
        seconds: From the first byte of a request to the last one of its answer; only what was answered.
        first_token_seconds: From a request to the first piece of its stream.
        in_flight: Requests that are answered, or wait for it.
        tokens: ``prompt`` and ``completion``: positions that the generator read, tokens that it wrote. Of the passages
            among them ``origin``: tokens that they would have taken as text; ``compressed``: positions that they took.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("vist_rag_requests", "Chat completions by status.", ["status"], registry=registry)
        self.seconds = Histogram(
            "vist_rag_request_seconds", "Duration of answered requests.", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "vist_rag_first_token_seconds", "Time to the first piece of a stream.", buckets=_SECONDS, registry=registry
        )
        self.in_flight = Gauge("vist_rag_requests_in_flight", "Requests being answered.", registry=registry)
        self.tokens = Counter(
            "vist_rag_tokens",
            "Tokens: prompt, completion; passages as text (origin) and as they were read (compressed).",
            ["kind"],
            registry=registry,
        )

    def count(self, usage: Usage) -> None:
        """Add what an answer cost."""
        for kind in ("prompt", "completion", "origin", "compressed"):
            self.tokens.labels(kind).inc(getattr(usage, f"{kind}_tokens"))

    def exposition(self) -> bytes:
        """All counters, in Prometheus' text format."""
        return generate_latest(self.registry)
