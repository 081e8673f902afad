"""Passages that are hard to compress, with questions about what is hard in them: made up from templates and a seed."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vist_rag.types import Passage

_THINGS = [
    "crane",
    "lathe",
    "pump",
    "kiln",
    "press",
    "loom",
    "mixer",
    "furnace",
    "scanner",
    "turbine",
    "ferry",
    "tram",
    "lock",
    "valve",
    "sensor",
]
_PLACES = [
    "Harbour Street",
    "the north hall",
    "Mill Lane",
    "the old depot",
    "Bergen",
    "the east wing",
    "Station Road",
    "Leeds",
]
_PEOPLE = [
    "Anna Weber",
    "Tom Okafor",
    "Maria Lindqvist",
    "Jean Petit",
    "Rosa Marino",
    "Ivan Horak",
    "Lena Fischer",
    "Omar Haddad",
]
_MONTHS = ["January", "March", "April", "June", "July", "September", "October", "November"]
_FILLERS = (
    "It was bought in {month} and has been in daily use since then.",
    "{person} looks after it and writes a short report every month.",
    "Visitors may see it on the first Sunday of {month}.",
    "The old one was given to a school in the neighbourhood.",
    "Repairs are paid by the town, which owns the building.",
    "A spare key is kept by {person} in the office.",
)


@dataclass(frozen=True)
class HardQuestion:
    """A question, its answer, the passage that says it, and what sort of value the answer is."""

    id: str
    sort: str
    question: str
    answers: tuple[str, ...]
    passage: Passage


def _chars(alphabet: str, size: int, rng: random.Random) -> str:
    return "".join(rng.choices(alphabet, k=size))


def _serial(rng: random.Random) -> str:
    letters, digits = string.ascii_uppercase, string.digits
    tail = _chars(letters, 2, rng) + _chars(digits, 1, rng)
    return "-".join((_chars(letters, 2, rng), _chars(digits, 4, rng), tail))


def _uuid(rng: random.Random) -> str:
    return "-".join(_chars("0123456789abcdef", size, rng) for size in (8, 4, 4, 4, 12))


def _mail(rng: random.Random) -> str:
    first, last = rng.choice(_PEOPLE).lower().split()
    return f"{first}.{last}{rng.randrange(10, 99)}@{rng.choice(('portmail', 'townhall', 'museum'))}.org"


def _url(rng: random.Random) -> str:
    return f"https://{rng.choice(('docs', 'parts', 'archive'))}.example/{rng.choice(_THINGS)}/{_serial(rng).lower()}"


def _row(rng: random.Random) -> str:
    return f"{rng.choice(string.ascii_uppercase)}{rng.randrange(100, 999)}"


def _one_of(text: str) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(text.split("|"))


# What a value is called, and what makes one.
VALUES: Mapping[str, tuple[str, Callable[[random.Random], str]]] = {
    "identifier": ("serial number", _serial),
    "digits 6": ("stock number", lambda rng: _chars(string.digits, 6, rng)),
    "digits 12": ("account number", lambda rng: _chars(string.digits, 12, rng)),
    "number 2-4": ("number of parts", lambda rng: str(rng.randrange(10, 9999))),
    "amount": ("price", lambda rng: f"${rng.randrange(1000, 999999):,}.{rng.randrange(100):02}"),
    "date": (
        "date of inspection",
        lambda rng: f"{rng.randint(1990, 2024)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    ),
    "version": ("firmware version", lambda rng: f"v{rng.randrange(20)}.{rng.randrange(50)}.{rng.randrange(100, 999)}"),
    "hexadecimal": ("checksum", lambda rng: _chars("0123456789abcdef", 12, rng)),
    "uuid": ("record key", _uuid),
    "mail": ("contact address", _mail),
    "url": ("manual", _url),
    "code": ("start command", lambda rng: f"run_{rng.choice(_THINGS)}(--level={rng.randrange(10, 99)})"),
    "capitals": ("call sign", lambda rng: _chars(string.ascii_uppercase, 6, rng)),
    "accented": ("maker", _one_of("Škoda Plzeň|Bröderna Åkesson|Établissements Lévêque|Müller & Söhne|Peña Núñez")),
    "cyrillic": ("maker", _one_of("Завод Молот|Северный Ветер|Красный Мост|Новая Волна|Тихий Дон")),
    "greek": ("maker", _one_of("Παλιά Γέφυρα|Μεγάλος Δρόμος|Λευκός Πύργος|Νέα Θάλασσα|Ήλιος Αθήνα")),
    "cjk": ("maker", _one_of("東京機械|大阪製作所|北京重工|横浜造船|上海电气")),
}


def hard_questions(count: int, seed: int) -> list[HardQuestion]:
    """As many questions of each sort of value; the same for the same seed."""
    rng = random.Random(f"guard-questions-{seed}")
    sorts = list(VALUES)
    return [_question(i, sorts[i % len(sorts)], rng, seed) for i in range(count)]


def _question(number: int, sort: str, rng: random.Random, seed: int) -> HardQuestion:
    thing, place = rng.choice(_THINGS), rng.choice(_PLACES)
    name, make = VALUES[sort]
    value = make(rng)
    fillers = [
        filler.format(month=rng.choice(_MONTHS), person=rng.choice(_PEOPLE)) for filler in rng.sample(_FILLERS, 3)
    ]
    if number % 5 == 4:  # as a row of a table
        rows = [f"{other} | {make(rng)} | {rng.choice(_PLACES)}" for other in rng.sample(_THINGS, 3) if other != thing]
        rows.insert(rng.randrange(len(rows) + 1), f"{thing} | {value} | {place}")
        text = "\n".join([f"machine | {name} | place", *rows, fillers[0]])
    else:
        sentence = f"The {name} of the {thing} in {place} is {value}."
        at = rng.randrange(3)
        text = " ".join([f"The {thing} is one of the machines in {place}.", *fillers[:at], sentence, *fillers[at:]])
    id_ = f"hard-{seed}-{number}"
    return HardQuestion(id_, sort, f"What is the {name} of the {thing}?", (value,), Passage(text, id=id_))
