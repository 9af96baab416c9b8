"""Ways to damage a slim file and its structure at random, for `benchmarks/chaos_files.py` and the tests."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mmcpd.engine import reader
from mmcpd.engine.slim_file import checksum

DEEP = '@deep'  # stands for lists in lists, which Python's own writer refuses


# -- structures ------------------------------------------------------------------------------------------------
def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in nested dicts and lists, as the container and the key."""
    found = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    inner = [value[key] for _, key in found if isinstance(value[key], dict | list)]
    return found + [place for part in inner for place in places(part)]


def strange(value: Any, names: list[str], rng: random.Random) -> Any:
    """Return a value of another size, type or nesting."""
    near = [value - 1, value + 1, value * 2, -value, float(value), str(value)] if type(value) is int else []
    numbers = [0, 1, -1, 3_000_000, 2**31, 2**63, 10**40, -(10**40), float('nan'), float('inf'), 1e308, 0.5, True]
    texts = ['', 'x' * 100_000, '__class__', '_parameters', 'training', 'init_cfg', 'a\nb', '\x00', '../..', DEEP]
    nested = [None, [], {}, [value], {'a': value}, [[[]]] * 100, [1] * 1000, {'kind': 'MultiheadAttention'}]
    return rng.choice([rng.choice(near or numbers), *rng.choices(numbers, k=2), rng.choice(texts), rng.choice(names),
                       rng.choice(nested)])  # fmt: skip


def damage_structure(data: bytes, rng: random.Random) -> bytes:
    """Change one to three values, names, types or nestings of a file's structure; the checksum is put right."""
    content = _read(data)
    text = content['structure']
    plan = json.loads(text)
    names = sorted(set(re.findall(r'[\w.]{2,}', text)))
    for _ in range(rng.randint(1, 3)):
        where, key = rng.choice(places(plan))
        action = rng.randrange(5)
        if action == 0:
            del where[key]
        elif action == 1 and isinstance(where, dict):
            other = strange(key, names, rng)
            where[other if isinstance(other, str) else str(key) + '.'] = where.pop(key)
        elif action == 2:
            other, place = rng.choice(places(plan))
            where[key] = copy.deepcopy(other[place])
        else:
            where[key] = strange(where[key], names, rng)
        if not plan:
            break
    deep = rng.choice([50, 900, 100_000])
    text = json.dumps(plan).replace(f'"{DEEP}"', '[' * deep + ']' * deep, 1)
    content = content | {'structure': text}
    return written(content | {'checksum': checksum(content)})


@lru_cache(maxsize=1)
def _read(data: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(data), weights_only=True)


def written(content: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# -- files -----------------------------------------------------------------------------------------------------
def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, or cut, blank, double or put in bytes."""
    broken, at = bytearray(data), rng.randrange(len(data))
    length = rng.choice([1, 8, 500, len(data)])
    action = rng.randrange(8)
    if action < 4:
        for _ in range(rng.choice([1, 1, 8])):
            broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == 4:
        del broken[at:]
    elif action == 5:
        broken[at : at + length] = bytes(len(broken[at : at + length]))
    elif action == 6:
        broken[at:at] = broken[at : at + length]
    else:
        broken[at : at + length] = rng.randbytes(min(length, 1000))
    return bytes(broken)


def damage_archive(data: bytes, rng: random.Random) -> bytes:
    """Write the archive anew with a member dropped, renamed, packed, exchanged, doubled or damaged."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at, other, action = rng.randrange(len(members)), rng.randrange(len(members)), rng.randrange(7)
    name, value = members[at]
    pickled = next(i for i, (title, _) in enumerate(members) if title.endswith('data.pkl'))
    if action == 0:
        del members[at]
    elif action == 1:
        members[at] = rng.choice([f'{name}0', '../evil', name.upper(), members[other][0]]), value
    elif action == 2:
        members[at] = name, members[other][1]
    elif action == 3:
        members[at] = name, value + bytes(rng.choice([1, 10_000_000]))
    elif action < 6:
        members[pickled] = members[pickled][0], damage_bytes(members[pickled][1], rng)
    kind = zipfile.ZIP_DEFLATED if action in (3, 6) else zipfile.ZIP_STORED
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', kind) as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # two members of one name
        for title, part in members:
            archive.writestr(title, part)
        archive.comment = rng.choice([b'', b'', b'PK\x05\x06'])
    return out.getvalue()


def damage_entries(data: bytes, rng: random.Random) -> bytes:
    """Put a value of another kind at one place of the content, with the checksum put right where it has one."""
    content = reader.load(io.BytesIO(data))
    parts = [part for part in content.values() if isinstance(part, dict)]
    where, key = rng.choice([(part, key) for part in (content, *parts) for key in part])
    old = where[key]
    kinds: list[Callable[[], Any]] = [
        lambda: None, dict, lambda: [old], lambda: 'x', lambda: 2**70, lambda: float('nan'), lambda: {1: old},
        lambda: torch.ones(1), lambda: torch.ones(()).expand(2000, 1000), lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.ones(3, dtype=torch.complex64), lambda: torch.ones(9, device='meta'), cyclic,
        lambda: old.double() if isinstance(old, Tensor) else 3, lambda: nn.Parameter(torch.ones(2)),
        lambda: doubled(60), lambda: old.bool() if isinstance(old, Tensor) else True,
    ]  # fmt: skip
    where[key] = rng.choice(kinds)()
    if rng.random() < 0.2:
        where[rng.choice(['other', 'fc.weight', '_extra_state', ''])] = where.pop(key)
    with suppress(ValueError, RecursionError, NotImplementedError, RuntimeError, TypeError):
        endless = any(isinstance(value, list) and len(value) == 2 for value in where.values())  # `doubled` has no end
        if 'checksum' in content and not endless:
            content['checksum'] = checksum(content)
    return written(content)


def cyclic() -> list[Any]:
    """Return a list that holds itself."""
    value: list[Any] = []
    value.append(value)
    return value


def doubled(times: int) -> list[Any]:
    """Return a list that names 2 to the power of `times` values."""
    value: list[Any] = [1, 1]
    for _ in range(times):
        value = [value, value]
    return value
