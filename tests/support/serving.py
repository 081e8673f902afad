"""A stand-in for vLLM and SGLang: checks what comes in as they do, and answers with a tiny model that reads it.

Written from their sources (vLLM: ``renderers/embed_utils.py``, ``entrypoints/chat_utils.py``; SGLang:
``managers/tokenizer_manager.py``), as far as a request of embeddings goes. It is no vLLM: one request after the other
reads the model, greedily.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch
from torch import Tensor

from vist_rag.generation import VistGenerator

PLACE = "\u2042embeds\u2042"


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


@dataclass
class StandIn:
    """What the server is like; tests change it between requests.

    Attributes:
        local: Whose model reads; nothing else of it is used but its tokenizer.
        served: Names of the model.
        flags: Options it was started with.
        api_key: What a request must bring.
        context: Positions of prompt and answer.
        content_format: How parts of a message come together where the chat template takes a string: vLLM puts a line
            break between them (``string``), or gives the template a list (``openai``).
        trouble: What happens to the next requests in the place of an answer: an error, ``drop``, or seconds of silence.
        pause_s: Between the pieces of a stream.
        breaks_after: Pieces after which a stream breaks off.
    """

    local: VistGenerator
    served: tuple[str, ...] = ("tiny",)
    flags: set[str] = field(default_factory=lambda: {"--enable-prompt-embeds", "--disable-radix-cache"})
    api_key: str | None = None
    context: int = 256
    content_format: Literal["openai", "string"] = "openai"
    trouble: list[RefusalError | Literal["drop"] | float] = field(default_factory=list)
    pause_s: float = 0.0
    breaks_after: int | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    left: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    # -------------------------------------------------------------------------------------------------- what comes in

    def embeds(self, body: dict[str, Any], path: str) -> Tensor:
        """The prompt of a request, ``[t, d_llm]``, or a refusal."""
        if path != "/generate":
            if body.get("model") not in self.served:
                raise RefusalError(404, f"The model `{body.get('model')}` does not exist.")
            if body.get("stream_options") and not body.get("stream"):
                raise RefusalError(400, "Stream options can only be defined when `stream=True`.")
        match path:
            case "/v1/completions":
                if body.get("prompt") is None and body.get("prompt_embeds") is None:
                    raise RefusalError(400, "At least one of `prompt` or `prompt_embeds` must be set.")
                assert body.get("prompt") is None, "the stand-in reads embeddings only"
                rows = self.tensor(body["prompt_embeds"])
            case "/v1/chat/completions":
                rows = self.conversation(body["messages"], opens=body.get("add_special_tokens", False))
            case "/generate":
                if "--disable-radix-cache" not in self.flags:
                    raise RefusalError(
                        400,
                        "input_embeds is provided while disable_radix_cache is False. Please add "
                        "`--disable-radix-cache` when you launch the server if you want to use input_embeds as inputs.",
                    )
                assert isinstance(body["input_embeds"][0][0], float), "one prompt: numbers, two levels deep"
                rows = torch.tensor(body["input_embeds"]).to(self.local.model.dtype)
            case _:
                raise RefusalError(404, "Not Found")
        limit = body.get("sampling_params", {}).get("max_new_tokens", body.get("max_tokens"))
        if len(rows) + limit > self.context:
            raise RefusalError(400, f"This model's maximum context length is {self.context} tokens.")
        with self.lock:
            self.read.append(rows)
        return rows

    def tensor(self, data: str) -> Tensor:
        """As vLLM's ``safe_load_prompt_embeds``."""
        if "--enable-prompt-embeds" not in self.flags:
            raise RefusalError(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        try:
            raw = base64.b64decode(data.encode(), validate=True)
        except binascii.Error as error:
            raise RefusalError(400, str(error)) from error
        tensor = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise RefusalError(400, "`prompt_embeds` must be a 2D tensor of shape (num_tokens, hidden_size).")
        width = self.local.model.config.hidden_size
        if tensor.shape[1] != width:
            raise RefusalError(
                400,
                f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match the model's hidden_size {width}.",
            )
        # Newer versions cast, older ones fail: what is sent must need neither.
        if tensor.dtype != self.local.model.dtype:
            raise RefusalError(400, f"`prompt_embeds` dtype {tensor.dtype} is not the model's.")
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "more was sent than the tensor"
        return tensor

    def conversation(self, messages: list[dict[str, Any]], *, opens: bool) -> Tensor:
        """Messages through the chat template, with embeddings where their parts stood."""
        tensors: list[Tensor] = []

        def text(part: dict[str, Any]) -> str:
            if part["type"] == "text":
                return str(part["text"])
            if part["type"] != "prompt_embeds":
                raise RefusalError(400, f"Unsupported chat content part type: {part['type']!r}.")
            tensors.append(self.tensor(part["data"]))
            return PLACE

        between = "\n" if self.content_format == "string" else ""
        chat = [
            {"role": m["role"], "content": between.join(t for part in m["content"] if (t := text(part)))}
            for m in messages
        ]
        tokenizer, table = self.local.tokenizer, self.local.model.get_input_embeddings()
        written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rows: list[Tensor] = []
        for i, piece in enumerate(written.split(PLACE)):
            rows += tensors[i - 1 : i] if i else []
            ids = tokenizer(piece, add_special_tokens=opens and i == 0).input_ids
            rows.append(table(torch.tensor(ids, dtype=torch.long)))
        return torch.cat(rows)

    # -------------------------------------------------------------------------------------------------- what goes out

    @torch.no_grad()
    def tokens(self, body: dict[str, Any], rows: Tensor) -> list[int]:
        """The most likely answer, up to where it holds a stop string."""
        said = {**body, **body.get("sampling_params", {})}
        assert said["temperature"] == 0 or said.get("seed", said.get("sampling_seed")) is not None
        model, tokenizer = self.local.model, self.local.tokenizer
        limit = said.get("max_new_tokens", said.get("max_tokens"))
        with self.lock:
            output = model.generate(inputs_embeds=rows[None], do_sample=False, max_new_tokens=limit)[0].tolist()
        ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
        for n in range(1, len(output) + 1):
            text = tokenizer.decode(output[:n], skip_special_tokens=True)
            if output[n - 1] in ends or any(stop in text for stop in said.get("stop", ())):
                return output[:n]
        return output

    def text(self, body: dict[str, Any], tokens: list[int]) -> str:
        """Tokens as text, a stop string and what follows it left out."""
        text = self.local.tokenizer.decode(tokens, skip_special_tokens=True)
        said = {**body, **body.get("sampling_params", {})}
        if said.get("no_stop_trim"):
            return text
        return min((text.split(stop)[0] for stop in said.get("stop", ())), key=len, default=text)

    def pieces(self, body: dict[str, Any], tokens: list[int]) -> Iterator[str]:
        """The text as it grows by a token at a time, each longer than the one before."""
        whole, given = self.text(body, tokens), ""
        for n in range(1, len(tokens) + 1):
            text = self.text(body, tokens[:n])
            if whole.startswith(text) and len(text) > len(given):
                given = text
                yield text
        if given != whole:
            yield whole


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._admitted():
            models = [{"id": name, "object": "model"} for name in self.stand_in.served]
            self._say(200, {"object": "list", "data": models} if self.path == "/v1/models" else {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.stand_in
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            trouble = server.trouble.pop(0) if server.trouble else None
        try:
            if not self._admitted():
                return
            if trouble == "drop":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if isinstance(trouble, float):
                time.sleep(trouble)
            if isinstance(trouble, RefusalError):
                raise trouble
            rows = server.embeds(body, self.path)
            tokens = server.tokens(body, rows)
            if body.get("stream"):
                self._stream(body, tokens, len(rows))
            else:
                self._say(200, self._answer(server.text(body, tokens), "text", "message", len(rows), len(tokens)))
        except RefusalError as refusal:
            error = {"message": str(refusal), "type": "Error", "code": refusal.status}
            self._say(refusal.status, {"error": error}, **refusal.headers)
        except (BrokenPipeError, ConnectionResetError):
            server.left.set()
        finally:
            with server.lock:
                server.busy -= 1

    def _admitted(self) -> bool:
        key = self.stand_in.api_key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._say(401, {"error": f"Unauthorized: {self.headers['Authorization']}"})
        return False

    def _answer(self, text: str, whole: str, message: str, prompt: int, completion: int) -> dict[str, Any]:
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        if self.path == "/generate":
            return {"text": text, "meta_info": counts}
        choice: dict[str, Any] = {whole: text} if self.path == "/v1/completions" else {message: {"content": text}}
        return {"choices": [{"index": 0, "finish_reason": None, **choice}], "usage": counts}

    def _stream(self, body: dict[str, Any], tokens: list[int], length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        given = ""
        for n, text in enumerate(self.stand_in.pieces(body, tokens)):
            if n == self.stand_in.breaks_after:
                return
            new = text if self.path == "/generate" else text[len(given) :]
            given = text
            event = self._answer(new, "text", "delta", length, len(tokens))
            if self.path != "/generate":
                event.pop("usage")
            self._event(event)
            time.sleep(self.stand_in.pause_s)
        if body.get("stream_options", {}).get("include_usage"):
            self._event({"choices": [], "usage": {"prompt_tokens": length, "completion_tokens": len(tokens)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        # As it is, as vLLM writes it: a line separator in a text is none of the stream.
        self.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())

    def _say(self, status: int, body: Any, **headers: str) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def served(stand_in: StandIn) -> Iterator[StandIn]:
    """The stand-in at a port of this machine."""
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        stand_in.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
