"""Seeded mutations of bytes, text, JSON values and command lines. `rng` is a `random.Random`."""

import copy
import json

NUMBERS = [0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e-30, 1e30, 1e308, True, False]
TEXTS = [
    "",
    " ",
    "None",
    "nan",
    "inf",
    "-",
    "..",
    "../x",
    "/etc",
    "a" * 3000,
    "\0",
    "\n",
    "{}",
    "[]",
    "é",
    "​",
    "true",
    "0",
]
VALUES = [*NUMBERS, *TEXTS, None, [], {}, [[]], [1, 2], {"a": 1}, float("nan"), float("inf"), -float("inf")]


def value(rng, depth=0):
    """A value that hardly ever fits."""
    if depth < 3 and rng.random() < 0.15:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if depth < 3 and rng.random() < 0.1:
        return {rng.choice(["a", "type", "", "rope_type", "kind"]): value(rng, depth + 1)}
    return copy.deepcopy(rng.choice(VALUES))


def tree(rng, source, changes=None):
    """A nested dictionary or list with some of its leaves or branches replaced, removed, renamed, copied or added."""
    result = {"": copy.deepcopy(source)}
    for _ in range(changes or rng.randint(1, 3)):
        holder, key = rng.choice(list(_places(result)))
        kind = rng.random()
        if kind < 0.65 or holder is result:
            holder[key] = _near(rng, holder[key]) if rng.random() < 0.4 else value(rng)
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice([f"{key}x", key[:-1], "unknown", str(key).upper()])] = copy.deepcopy(holder[key])
        else:
            holder.append(value(rng))
    return result[""]


def _places(holder):
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, item in list(items):
        yield holder, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def _near(rng, old):
    """A value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return rng.choice([0, -old, old + 1, old * 2, old * 10**6, old / 2, old / 3, type(old)(rng.choice(NUMBERS))])
    if isinstance(old, str):
        return text(rng, old)
    return [] if isinstance(old, list) else value(rng)


def content(rng, source):
    """Bytes with parts flipped, cut, doubled, overwritten or inserted."""
    data = bytearray(source)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = rng.choice([b"\0", b"\xff", b"\x80"]) * length
        else:
            data[at:at] = rng.randbytes(length)
    return bytes(data)


def text(rng, source):
    """Text with pieces cut, doubled or put in."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(source) + 1), rng.choice([1, 1, 3, 10])
        piece = rng.choice([*TEXTS, ",", '"', "'", ";", "\t", "\r", "\\", "<image>", source[at : at + length]])
        source = source[:at] + piece + source[at + rng.choice([0, length]) :]
    return source


def json_text(rng, source):
    """JSON text of a changed value, sometimes invalid JSON."""
    changed = json.dumps(tree(rng, source))
    kind = rng.random()
    if kind < 0.1:
        return text(rng, changed)
    if kind < 0.13:
        return "[" * 100_000
    if kind < 0.16:
        return changed.replace("1", "1" * 5000, 1)
    return changed


def words(rng, source):
    """A command line with flags doubled, cut, misspelt, or with other values."""
    result = list(source)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(result):
            result[at] = text(rng, result[at])
        elif kind == 1:
            result.insert(at, str(value(rng)))
        elif kind == 2 and result:
            del result[at % len(result)]
        elif result:
            flag = rng.choice(result).partition("=")[0]
            result.insert(at, f"{flag}={value(rng)}")
    return [word.replace("\0", "") for word in result]
