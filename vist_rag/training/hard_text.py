"""Texts of what a compressor loses first, made up from a seed: digit strings, identifiers, codes, tables, scripts.

Everything here is random, so that nothing can be guessed from its neighbours: what comes back was read.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType

_UPPER, _LOWER, _DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
_SYLLABLE_TEXT = (
    "ba be bi bo bra cal cen cha dan del der do el en fa fen for ga "
    "gen gra ha hel in jo ka kel la len lo ma men mi mor na nel no "  # codespell:ignore hel,mor
    "or pa pel pra ra ren ri ro sa sel ser sta ta ten tor tra u val "  # codespell:ignore ser
    "van ver vi wa wen yor za zen"
)
_SYLLABLES = _SYLLABLE_TEXT.split()
_FRAMES = (
    "The entry reads {} in the list.",
    "We noted {} and then {} on the same page.",
    "It was stored as {} until the end of the year.",
    "Between {} and {} nothing else was changed.",
    "Please use {} for the next order.",
    "The second column says {}, the third {}.",
)
_SCRIPTS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "accented": ((0xE0, 0xF6), (0xF8, 0x17E)),
        "greek": ((0x3B1, 0x3C9),),
        "cyrillic": ((0x430, 0x44F),),
        "arabic": ((0x627, 0x63A), (0x641, 0x64A)),
        "hebrew": ((0x5D0, 0x5EA),),
        "devanagari": ((0x905, 0x914), (0x915, 0x939)),
        "thai": ((0xE01, 0xE2E),),
        "cjk": ((0x4E00, 0x9FA5),),
        "hiragana": ((0x3042, 0x3093),),
        "hangul": ((0xAC00, 0xD7A3),),
    }
)


def hard_texts(count: int, seed: int) -> list[str]:
    """Short texts, as many of each sort; the same for the same seed.

    Args:
        count: Of texts.
        seed: Any whole number.
    """
    rng = random.Random(f"hard-text-{seed}")
    sorts = list(SORTS.values())
    return [_text(sorts[i % len(sorts)], rng) for i in range(count)]


def _text(sort: Callable[[random.Random], str], rng: random.Random) -> str:
    frames = rng.sample(_FRAMES, 4)
    return " ".join(frame.format(*(sort(rng) for _ in range(frame.count("{}")))) for frame in frames)


def _drawn(alphabet: str, low: int, high: int, rng: random.Random) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def _digits(rng: random.Random) -> str:
    return _drawn(_DIGITS, 1, 20, rng)


def _amount(rng: random.Random) -> str:
    whole = f"{rng.randrange(10 ** rng.randint(1, 9)):,}"
    return rng.choice(("", "$", "+", "-")) + whole + rng.choice(("", f".{rng.randrange(100):02}", "%"))


def _date(rng: random.Random) -> str:
    year, month, day = rng.randint(1000, 2999), rng.randint(1, 12), rng.randint(1, 28)
    hour = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return rng.choice((f"{year}-{month:02}-{day:02}", f"{day:02}/{month:02}/{year}", hour, str(year)))


def _identifier(rng: random.Random) -> str:
    parts = [_drawn(rng.choice((_UPPER, _DIGITS, _UPPER + _DIGITS)), 1, 5, rng) for _ in range(rng.randint(1, 4))]
    return rng.choice("-._").join([*parts, str(rng.randrange(10))])


def _version(rng: random.Random) -> str:
    return f"{rng.choice(('v', 'r', 'build-'))}{rng.randrange(30)}.{rng.randrange(100)}.{rng.randrange(1000)}"


def _hexadecimal(rng: random.Random) -> str:
    digits = _drawn("0123456789abcdef", 8, 40, rng)
    return rng.choice((digits, f"0x{digits[:8]}"))


def _uuid(rng: random.Random) -> str:
    digits = _drawn("0123456789abcdef", 32, 32, rng)
    return "-".join(digits[begin:end] for begin, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def _token(rng: random.Random) -> str:
    return _drawn(_UPPER + _LOWER + _DIGITS, 4, 24, rng)


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 6)))


def _mail(rng: random.Random) -> str:
    number = rng.choice(("", str(rng.randrange(100))))
    return f"{_name(rng)}.{_name(rng)}{number}@{_name(rng)}.{rng.choice(('org', 'de'))}"


def _url(rng: random.Random) -> str:
    query = rng.choice(("", f"?id={rng.randrange(10**6)}", f"#{_name(rng)}"))
    return f"https://{_name(rng)}.example/{_name(rng)}/{_drawn(_LOWER + _DIGITS, 3, 10, rng)}{query}"


def _path(rng: random.Random) -> str:
    return f"/{_name(rng)}/{_name(rng)}_{rng.randrange(100)}.{rng.choice(('txt', 'cfg', 'py'))}"


def _code(rng: random.Random) -> str:
    a, b = _name(rng), _name(rng)
    forms = (f"{a}({b}[{rng.randrange(50)}])", f"self.{a}_{b}", f"{a}+={b};", f"--{a}={b}", f"{a}::{b}", f"${{{a}}}")
    return rng.choice(forms)


def _camel(rng: random.Random) -> str:
    return _name(rng) + "".join(_name(rng).capitalize() for _ in range(rng.randint(1, 3)))


def _mixed_letters(rng: random.Random) -> str:
    return _drawn(_UPPER + _LOWER, 3, 18, rng)


def _capitals(rng: random.Random) -> str:
    return rng.choice((_drawn(_UPPER, 2, 18, rng), _name(rng).upper()))


def _nonsense(rng: random.Random) -> str:
    return rng.choice((_name(rng), _name(rng).capitalize(), _drawn(_LOWER, 2, 18, rng)))


def _row(rng: random.Random) -> str:
    return " | ".join((_identifier(rng), _name(rng), _amount(rng), _date(rng), _digits(rng)))


def _symbol(rng: random.Random) -> str:
    number = rng.randrange(10 ** rng.randint(1, 5))
    forms = (
        f"{number}°C",
        f"{number}€",
        f"±{number}",
        f"{number}–{number + rng.randrange(1, 99)}",
        f"{number}²",
        "→",
        "½",
    )
    return rng.choice(forms)


def _emoji(rng: random.Random) -> str:
    return "".join(chr(rng.randint(0x1F600, 0x1F64F)) for _ in range(rng.randint(1, 3)))


def _script(name: str) -> Callable[[random.Random], str]:
    alphabet = "".join(chr(c) for first, last in _SCRIPTS[name] for c in range(first, last + 1))
    if name != "accented":
        return lambda rng: _drawn(alphabet, 1, 18, rng)

    def accented(rng: random.Random) -> str:
        plain = _name(rng)
        at = rng.randrange(len(plain))
        return plain[:at] + rng.choice(alphabet) + plain[at + 1 :]

    return accented


SORTS: Mapping[str, Callable[[random.Random], str]] = MappingProxyType(
    {
        "digits": _digits,
        "amounts": _amount,
        "dates": _date,
        "identifiers": _identifier,
        "versions": _version,
        "hexadecimal": _hexadecimal,
        "uuids": _uuid,
        "tokens": _token,
        "mails": _mail,
        "urls": _url,
        "paths": _path,
        "code": _code,
        "camel case": _camel,
        "mixed letters": _mixed_letters,
        "capitals": _capitals,
        "made-up words": _nonsense,
        "table rows": _row,
        "symbols": _symbol,
        "emoji": _emoji,
        **{name: _script(name) for name in _SCRIPTS},
    }
)
"""What makes a word, or a row, of each sort."""
