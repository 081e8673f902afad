"""``vist-rag serve``: an OpenAI-compatible server over an index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vist_rag.cli.ask import chosen_budget
from vist_rag.cli.models import load_rag, open_existing, tell_of_other_memories
from vist_rag.cli.terminal import Interrupted, ModelOption, command, printable, say
from vist_rag.errors import ConfigError

_KEY_VARIABLE = "VIST_RAG_API_KEY"


@command
def serve(
    index: Annotated[Path, typer.Option("--index", metavar="DIR", help="An index that vist-rag index made.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0: one that is free.")] = 8000,
    name: Annotated[str, typer.Option(help="What clients call the model.")] = "vist-rag",
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the key that clients must send.", show_default=f"${_KEY_VARIABLE}"),
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Let everybody in, also from other machines.")
    ] = False,
    k_raw: Annotated[int | None, typer.Option(help="Best passages that are read as text.")] = None,
    k_memory: Annotated[int | None, typer.Option(help="Next passages, which are read as memory.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens that all passages may take together.")] = None,
    guard: Annotated[str, typer.Option(metavar="off|on|strict", help="As for vist-rag ask.")] = "on",
    max_in_flight: Annotated[int, typer.Option(help="Requests at a time; more are refused.")] = 64,
    max_streams: Annotated[int, typer.Option(help="Streams that generate at a time; more wait.")] = 4,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = 2**20,
    max_tokens: Annotated[int, typer.Option(help="What a request may ask for, at most.")] = 1024,
    max_passages: Annotated[int, typer.Option(help="What a request may have read, at most.")] = 64,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Of one request.")] = 60.0,
    grace: Annotated[int, typer.Option(min=0, metavar="SECONDS", help="For requests in flight after SIGTERM.")] = 30,
    model: ModelOption = None,
) -> None:
    """Serve an index to any client of OpenAI's chat completions, until SIGTERM or ctrl-C.

    Without a key only this machine is served, unless --without-key says otherwise.
    """
    from vist_rag.serving import Limits, create_app, is_loopback
    from vist_rag.serving import serve as run

    limits = Limits(max_body_bytes, max_in_flight, max_streams, timeout, max_tokens, max_passages)
    api_key = _api_key(api_key_file)
    if api_key is None and not (is_loopback(host) or without_key):
        raise ConfigError(
            f"--host must be an address of this machine alone where there is no key, got {host}; set ${_KEY_VARIABLE}, "
            "or give --api-key-file, or say --without-key."
        )
    own = api_key is None and is_loopback(host)
    with open_existing(index) as opened:
        rag = load_rag(model, opened, guard=guard)
        tell_of_other_memories(opened, index, rag.compressor.fingerprint)
        rag.budget = chosen_budget(rag, k_raw=k_raw, k_memory=k_memory, tokens=budget)
        rag.answer("ready?")  # the first answer loads the embedder
        app = create_app(
            rag,
            model_name=name,
            api_key=api_key,
            limits=limits,
            allowed_hosts=("localhost", "127.0.0.1", "[::1]", host) if own else ("*",),
        )
        try:
            run(app, host=host, port=port, grace_s=grace, started=lambda url: typer.echo(f"serving {name} at {url}/v1"))
        except KeyboardInterrupt:
            raise Interrupted("requests in flight were finished.") from None
    say("stopped: requests in flight were finished.")


def _api_key(file: Path | None) -> str | None:
    """The key that clients must send; None where there is none."""
    if file is not None:
        source, key = f"--api-key-file {printable(str(file))}", file.read_text("utf-8", "replace").strip()
    elif _KEY_VARIABLE in os.environ:
        source, key = f"${_KEY_VARIABLE}", os.environ[_KEY_VARIABLE].strip()
    else:
        return None
    if not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ConfigError(f"{source} must hold a key of visible ASCII characters, got something else; write one word.")
    return key
