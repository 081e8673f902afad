"""Many clients of a real server, polite and rude, and a SIGTERM in the midst of it: no answer lost, none mixed up.

    python benchmarks/serve_load.py --seconds 60 --json

``vist-rag serve`` runs as a process of its own, over the demo corpus. Each of 32 OpenAI clients asks one development
question after the other, whole or as a stream, and compares text and cited passages with what the same server said
when it was asked that question alone. Meanwhile others send wrong keys, broken JSON and bodies of 10 MB, and leave in
the middle of an answer. At the end the server is sent SIGTERM while all of them go on. What was asked before must be
answered, what comes later is turned away, and the process must end with 0. All traffic stays on this machine.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai

from vist_rag import PassageIndex, VistRAG
from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.provenance import run_facts
from vist_rag.pipeline import encode_lacking

KEY = "a key of this benchmark".replace(" ", "-")
UNREAD_S = 0.5
"""What was sent less than this before the signal may not have been read by the server yet."""
BODY_BYTES = 10_000_000
RUDE = {"wrong_key": 401, "broken_json": 400, "large_body": 413, "leaves_stream": None, "leaves_whole": None}
"""What each rude client does, and the status that it must get."""


@dataclass(frozen=True)
class Said:
    """What the server said to a question."""

    text: str
    cited: tuple[str, ...]


@dataclass
class Seen:
    """What the clients saw; lists and counters are shared by their threads."""

    signalled: float = float("inf")
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"whole": [], "stream": [], "first_piece": []})
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    turned_away: int = 0
    finished_after_signal: int = 0
    ids: list[str] = field(default_factory=list)
    rude: Counter[str] = field(default_factory=Counter)


def make_index(directory: Path, count: int) -> list[str]:
    """An index of the demo corpus, with memories; a few questions need their passages alone. Returns the questions."""
    asked = demo_questions("dev")[:count]
    gold = {question.passage_id for question in asked}
    with PassageIndex.open(directory) as index:
        index.add([p for p in demo_passages() if p.id in gold or count >= 50])
        rag = VistRAG.from_pretrained(None, index)
        for _ in encode_lacking(index, rag.compressor):
            pass
    return [question.question for question in asked]


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process, and its URL."""
    environment = {**os.environ, "VIST_RAG_API_KEY": KEY}
    with log.open("w") as errors:
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if " at http" not in line:
                raise RuntimeError(f"the server did not start: {line}{log.read_text()}")
            yield server, line.split(" at ")[1].strip()
        finally:
            server.kill()
            server.wait()


def client_of(url: str, key: str = KEY) -> openai.OpenAI:
    """A client that does not try again, so that every failure is seen."""
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300)


def ask(client: openai.OpenAI, question: str, *, stream: bool, seen: Seen | None = None) -> Said:
    """One question; what a stream said is its pieces, joined."""
    asked: dict[str, Any] = {"model": "vist-rag", "messages": [{"role": "user", "content": question}]}
    begin = time.monotonic()
    if not stream:
        whole = client.chat.completions.create(**asked)
        message, id_ = whole.choices[0].message, whole.id
        said = Said(message.content, tuple(c["id"] for c in message.citations))
    else:
        pieces: list[str] = []
        for event in client.chat.completions.create(**asked, stream=True):
            if not pieces and seen is not None:
                seen.seconds["first_piece"].append(time.monotonic() - begin)
            pieces.append(event.choices[0].delta.content)
        if event.choices[0].finish_reason is None:
            raise RuntimeError("the stream ended without an end")
        said, id_ = Said("".join(pieces), tuple(c["id"] for c in event.choices[0].delta.citations)), event.id
    if seen is not None:
        seen.seconds["stream" if stream else "whole"].append(time.monotonic() - begin)
        seen.ids.append(id_)
        seen.finished_after_signal += time.monotonic() > seen.signalled
    return said


def be_polite(number: int, url: str, known: dict[tuple[str, bool], Said], seen: Seen) -> None:
    """Ask until the server is gone, and compare."""
    client, rng, questions = client_of(url), random.Random(number), sorted({question for question, _ in known})
    while True:
        question, stream, begin = rng.choice(questions), rng.random() < 0.5, time.monotonic()
        try:
            said = ask(client, question, stream=stream, seen=seen)
        except Exception as error:
            if begin < seen.signalled - UNREAD_S:
                seen.lost.append(f"{question}: {type(error).__name__}: {error}")
                continue
            seen.turned_away += 1
            return
        if said != known[question, stream]:
            seen.wrong.append(f"{question}: {said}, not {known[question, stream]}")


def be_rude(url: str, question: str, seen: Seen) -> None:
    """Do what must be refused, and leave, in turn, until the server is gone."""
    at, path = urlsplit(url).netloc, urlsplit(url).path + "/chat/completions"
    good = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = {"model": "vist-rag", "messages": [{"role": "user", "content": question}]}
    for kind in itertools.cycle(RUDE):
        begin = time.monotonic()
        connection = http.client.HTTPConnection(at, timeout=300)
        try:
            headers = good | ({"Authorization": "Bearer wrong"} if kind == "wrong_key" else {})
            body = json.dumps(request | ({"stream": True} if kind == "leaves_stream" else {})).encode()
            body = {"broken_json": body[:-3], "large_body": b" " * BODY_BYTES}.get(kind, body)
            connection.request("POST", path, body, headers)
            if kind == "leaves_whole":
                time.sleep(0.02)
                seen.rude[f"{kind}: left"] += 1
            elif kind == "leaves_stream":
                connection.getresponse().read(1)
                seen.rude[f"{kind}: left"] += 1
            else:
                seen.rude[f"{kind}: {connection.getresponse().status}"] += 1
        except OSError as error:
            if begin < seen.signalled - UNREAD_S:
                seen.rude[f"{kind}: {type(error).__name__}"] += 1
                continue
            return
        except http.client.HTTPException:
            return
        finally:
            connection.close()
        time.sleep(0.1)


def load(seconds: float, clients: int, command: Sequence[str], questions: Sequence[str], log: Path) -> dict[str, Any]:
    """Serve, ask alone, ask together for so long, stop; what was seen.

    Args:
        seconds: Until the signal.
        clients: Polite ones.
        command: Starts the server.
        questions: What is asked.
        log: Where the server's errors go.
    """
    seen, ways = Seen(), (False, True)
    with running(command, log) as (server, url):
        alone = client_of(url)
        known = {(question, stream): ask(alone, question, stream=stream) for question in questions for stream in ways}
        polite = [threading.Thread(target=be_polite, args=(n, url, known, seen), daemon=True) for n in range(clients)]
        rude = [threading.Thread(target=be_rude, args=(url, questions[0], seen), daemon=True) for _ in range(2)]
        begin = time.monotonic()
        for thread in (*polite, *rude):
            thread.start()
        time.sleep(seconds)
        passed, answered = time.monotonic() - begin, len(seen.ids)
        seen.signalled = time.monotonic()
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=120)
        stopped_s = time.monotonic() - seen.signalled
        for thread in (*polite, *rude):
            thread.join(timeout=60)
    log_lines = log.read_text("utf-8").splitlines()
    unexpected = {
        what: n for what, n in seen.rude.items() if what.split(": ")[1] not in {"left", str(RUDE[what.split(": ")[0]])}
    }
    broken = [line for line in log_lines if "Traceback" in line or "Error" in line]
    twice = len(seen.ids) - len(set(seen.ids))
    return {
        "seconds": round(passed, 1),
        "clients": clients,
        "questions": len(questions),
        "answers": len(seen.ids),
        "answers_per_second": round(answered / passed, 2),
        "latency_ms": {kind: percentiles(values) for kind, values in seen.seconds.items()},
        "wrong_answers": seen.wrong,
        "lost_answers": seen.lost,
        "ids_given_twice": twice,
        "rude": dict(sorted(seen.rude.items())),
        "rude_unexpected": unexpected,
        "stop": {
            "exit_code": code,
            "seconds": round(stopped_s, 2),
            "finished_after_signal": seen.finished_after_signal,
            "turned_away": seen.turned_away,
        },
        "server_errors": broken,
        "held": bool(seen.ids) and not (seen.wrong or seen.lost or twice or unexpected or broken or code),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{p}": round(float(np.percentile(seconds, p)) * 1000, 1) for p in (50, 95, 99)} if seconds else {}


def main() -> None:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--questions", type=int, default=50, help="fewer than 50: over their passages alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        index = Path(directory, "index")
        questions = make_index(index, arguments.questions)
        serve = [sys.executable, "-m", "vist_rag.cli", "serve", "--index", str(index), "--port", "0"]
        result = load(arguments.seconds, arguments.clients, serve, questions, Path(directory, "server.log"))
    asked = f"--seconds {arguments.seconds:g} --clients {arguments.clients} --questions {arguments.questions}"
    command = f"python benchmarks/serve_load.py {asked} --json"
    document = {"benchmark": "serve_load", **run_facts(command), **result}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    raise SystemExit(not result["held"])


if __name__ == "__main__":
    main()
