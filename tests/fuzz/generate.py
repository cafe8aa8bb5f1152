"""
Rows as nobody should write them, and a few as they should be.

Everything is drawn from a `random.Random`, so that a row is known by its seed; [`Bytes`] is one that a fuzzer steers.
"""

import datetime
from collections.abc import Iterator
from hashlib import blake2b
from random import Random
from typing import Any

import numpy as np
from datasets import IterableDataset

from tests.conftest import TITLES


MARKERS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|assistant|>",
    "</s>",
    "<s>",
    "[INST]",
    "<end_of_turn>",
]
ODD_TEXTS = [
    "", " ", "\n\t ", "\x00", "a\x00b", "\x1b[31mred", "\ufeff", "\u2028", "\u202eevil", "\u00ad", "\u200b", "\ud800",
    " Heat\udfff", "é", "e\u0301", "Z" + "\u0336" * 40, "👩‍👩‍👧‍👦", "ﷺ", "\U0010ffff", "{{ 7 * 7 }}", "{% raw %}", "'; DROP TABLE", "None", "nan",
    "[1]", '{"a": 1}', "../../etc/passwd", "\\u0041", "%s%n", "=1+1", "<Title:x>", "::",
]  # fmt: skip
ODD_NUMBERS = [0, -1, 1, 31, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e300, 5e-324, float("nan"), float("inf")]
ROLES = ["user", "assistant", "system", "tool", "", "ASSISTANT", "\ud800", None, 3, ["user"]]


class Bytes(Random):
    """Draws from the bytes of a fuzzer; where they end, it goes on from a seed that is made of them."""

    def __new__(cls, data: bytes):
        return super().__new__(cls)

    def __init__(self, data: bytes):
        self.rest = iter(data)
        super().__init__(int.from_bytes(blake2b(data, digest_size=8).digest()))

    def getrandbits(self, count: int) -> int:
        taken = bytes(byte for _, byte in zip(range(-(-count // 8)), self.rest, strict=False))
        missing = count - 8 * len(taken)
        bits = int.from_bytes(taken)
        return bits >> -missing if missing <= 0 else bits << missing | super().getrandbits(missing)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def one_in(draw: Random, count: int) -> bool:
    return draw.randrange(count) == 0


def make_text(draw: Random) -> str:
    kind = draw.randrange(1000)
    if kind < 600:
        return " " + draw.choice(TITLES) + (f" {draw.randrange(99)}" if one_in(draw, 2) else "")
    if kind < 750:
        return draw.choice(ODD_TEXTS)
    if kind < 830:
        return draw.choice(["", " Heat", " "]) + draw.choice(MARKERS) + draw.choice(["", " Big", draw.choice(MARKERS)])
    if kind < 920:
        return "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(12)))
    if kind < 999:
        return draw.choice(TITLES) * draw.randrange(60)
    return draw.choice(["a", "é", " ", "Heat ", "\u0301", "<|end|>", "\n", "𝔘", "ab\x00"]) * (
        10**5 // draw.choice([1, 2, 5])
    )


def make_junk(draw: Random, depth: int = 3) -> Any:
    """A value of any type."""
    kind = draw.randrange(14)
    if kind < 4:
        return draw.choice([None, None, True, False, [], {}, ()])
    if kind < 6:
        return draw.choice(ODD_NUMBERS)
    if kind < 8 or depth == 0:
        return make_text(draw)
    if kind < 10:
        return [make_junk(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind < 11:
        return {_make_key(draw): make_junk(draw, depth - 1) for _ in range(draw.randrange(4))}
    if kind < 12:
        return draw.choice([make_message, make_completion])(draw, depth - 1)
    return draw.choice(
        [b"raw", b"\xff", {" Heat"}, (" Heat",), object(), Ellipsis, np.array([1.0, 2.0]), np.array([]), np.array([" Heat"]),
         np.float32(3), np.int64(4), np.str_(" Heat"), datetime.datetime(2003, 1, 31), datetime.timedelta(1), 1j, int, len,
         {1: 2, "a": 3}, {None: 1}, _nested(draw.choice([30, 3000])), _endless()]
    )  # fmt: skip


def _make_key(draw: Random) -> Any:
    return draw.choice(["role", "content", "tool_calls", "name", "a", "", "\ud800", 1, None])


def _nested(depth: int) -> Any:
    value: Any = " Heat"
    for level in range(depth):
        value = {"content": value} if level % 2 else [value]
    return value


def _endless() -> list:
    value: list = [" Heat"]
    value.append(value)
    return value


def make_message(draw: Random, depth: int = 2) -> Any:
    message: dict[Any, Any] = {"role": "assistant", "content": make_text(draw)}
    if one_in(draw, 4):
        kind = draw.randrange(7)
        if kind == 0:
            message.pop(draw.choice(["role", "content"]))
        elif kind == 1:
            message["role"] = draw.choice(ROLES)
        elif kind == 2:
            message["content"] = make_junk(draw, depth)
        elif kind == 3:
            message["content"] = [{"type": draw.choice(["text", "image", None]), "text": make_text(draw)}]
        elif kind == 4:
            message["tool_calls"] = make_junk(draw, depth)
        else:
            message[_make_key(draw)] = make_junk(draw, depth)
    return message


def make_completion(draw: Random, depth: int = 2) -> Any:
    if one_in(draw, 2):
        return make_text(draw)
    return [make_message(draw, depth) for _ in range(draw.choice([1, 1, 1, 1, 2, 0]))]


def make_row(draw: Random) -> dict[Any, Any]:
    """A row; about half of them keep the contract."""
    as_messages = one_in(draw, 3)
    count = _make_count(draw)
    several = draw.randrange(1, 5) if one_in(draw, 6) else None
    one_text = make_text if count < 20 else lambda draw: f" {draw.choice(TITLES)} {draw.randrange(10**9)}"

    def completion() -> Any:
        text = one_text(draw)
        return [{"role": "assistant", "content": text}] if as_messages else text

    row: dict[Any, Any] = {
        "prompt": f"Seen: {one_text(draw)}. Next:",
        "chosen": completion() if several is None else [completion() for _ in range(several)],
        "rejected": [completion() for _ in range(count)],
    }
    if as_messages:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if one_in(draw, 4):
        row["relevance"] = sorted((draw.randrange(99) / 8 for _ in range((several or 1) + count)), reverse=True)
    if one_in(draw, 8):
        _make_implicit(row, as_messages, several)
    if one_in(draw, 8):
        row["rejected"] = completion()
    for _ in range(draw.choice([0, 0, 0, 0, 1, 1, 2, 3])):
        _break(row, draw)
    return row


def _make_count(draw: Random) -> int:
    kind = draw.randrange(1000)
    if kind < 950:
        return draw.randrange(1, 7)
    if kind < 970:
        return 0
    return draw.randrange(7, 200) if kind < 997 else draw.randrange(200, 2001)


def _make_implicit(row: dict[Any, Any], as_messages: bool, several: int | None) -> None:
    prompt = row.pop("prompt")
    chosen = row["chosen"] if several is not None else [row["chosen"]]
    chosen = [prompt + completion for completion in chosen]
    row["chosen"] = chosen if several is not None else chosen[0]
    row["rejected"] = [prompt + completion for completion in row["rejected"]]


def _break(row: dict[Any, Any], draw: Random) -> None:
    """Changes one thing, mostly for the worse."""
    column = draw.choice(["prompt", "chosen", "rejected", "relevance"])
    entries = row.get(column)
    kind = draw.randrange(9)
    if kind == 0:
        row.pop(column, None)
    elif kind == 1:
        row[column] = make_junk(draw)
    elif kind == 2:
        row[column] = make_completion(draw)
    elif kind == 3:
        row["tools"] = draw.choice([make_junk(draw), "[]", "[", [{"type": "function"}]])
    elif kind == 4:
        row["chat_template_kwargs"] = draw.choice(
            [make_junk(draw), {"enable_thinking": False}, {"tokenize": False}, {"conversation": []}, {"padding": True}]
        )
    elif kind == 5:
        names = [
            "extra",
            "label",
            "",
            3,
            None,
            "row_index",
            "prompt_ids",
            "candidates",
            "candidate_ids",
            "rejected_ids",
            "user_id",
        ]
        row[draw.choice(names)] = draw.choice([make_junk(draw), draw.randrange(3), row.get("rejected")])
    elif isinstance(entries, list) and entries:
        place = draw.randrange(len(entries))
        if kind == 6:
            entries[place] = make_junk(draw)
        elif kind == 7:
            entries[place] = make_completion(draw)
        else:
            entries.append(draw.choice([entries[place], row.get("chosen")]))


# Rows of any kind can come from a generator, but not be pickled with it
_current: list[Any] = []


def make_stream(rows: list[Any]) -> IterableDataset:
    _current[:] = rows
    return IterableDataset.from_generator(_yield_current)


def _yield_current() -> Iterator[Any]:
    yield from _current
