"""Damage slim files, and their structures, at random, and see that loading them ends in a model or in a SlimError.

    python benchmarks/chaos_files.py --structures 10000 --files 2000 --seed 0

Each damaged file goes through `load_slim` and through a config of `type='mmcpd.slimmed'`. A structure is damaged with
its checksum put right again, as a stranger would; a file bit by bit, member by member and entry by entry. Reported: how
many loaded, how many ended in a SlimError of one line, whatever else happened, the slowest, and the peak of memory over
what the process had before, relative to the dense model's. A file that loads although its values differ from the
original's is `unnoticed`. Results go to `benchmarks/results/chaos_files.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.chaos_damage import damage_archive, damage_bytes, damage_entries, damage_structure
from benchmarks.time_limit import Slow, within
from mmcpd.comb import comb
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.slim_file import save_slim
from mmcpd.engine.slim_model import build_fresh
from mmcpd.errors import SlimError
from mmcpd.slim import slim, structure
from mmcpd.slim.trial import random_keep
from mmcpd.slim.weights import weights

RESULTS = Path(__file__).resolve().parent / 'results' / 'chaos_files.json'
SECONDS = 10  # that one load may take


@dataclass(frozen=True)
class Damage:
    """A way to damage a file, and whether a file that loads all the same must have its values as they were."""

    change: Callable[[bytes, random.Random], bytes]
    same: bool


STRUCTURES = {'structures': Damage(damage_structure, True)}
FILES = {
    'bytes': Damage(damage_bytes, True),
    'archives': Damage(damage_archive, True),
    'entries': Damage(damage_entries, False),
}


# -- a file with everything that a structure can say -------------------------------------------------------------------
class OwnAttention(nn.Module):
    """Attention whose last reshape needs a rewritten size."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self._width = heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj((q @ k.mT / 4).softmax(-1).matmul(v).transpose(1, 2).reshape(B, N, C))


class Waves(nn.Module):
    """Positions (1, tokens, width) that no weight has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype)
        return (places[:, None] * torch.arange(1, self.width + 1)).sin()[None]


@MODELS.register_module()
class Chaos(BaseModel):
    """A model with a lazy layer, a table made in the first forward, an attention to replace, one to rewrite, waves."""

    def __init__(self, width: int = 8, data_preprocessor: Any = None) -> None:
        super().__init__(data_preprocessor)
        self.stem, self.bn, self.lazy = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.LazyConv2d(width, 3)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.own, self.wide = OwnAttention(width, 2), nn.Linear(width, 4 * width)
        self.fc, self.more = nn.Linear(4 * width, 3), nn.Linear(4 * width, 3)
        self.waves = Waves(width)
        self.register_buffer('gains', torch.ones(width, 1, 1), persistent=False)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Tensor:
        x = self.lazy(self.bn(self.stem(inputs)).relu() * self.gains).relu()
        if 'table' not in self._buffers:
            self.register_buffer('table', torch.rand(x.shape[1], 1, 1))
        x = (x * self.table).flatten(2).mT
        x = x + self.waves(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.wide(self.own(x)).relu().mean(1)
        return self.fc(x) + self.more(x)


def config(width: int) -> Config:
    return Config({'model': {'type': 'Chaos', 'width': width}, 'default_scope': 'mmengine'})


def write(path: Path, width: int) -> tuple[Config, int]:
    """Write the slim file of a model; return its config, and the bytes of the dense model."""
    torch.manual_seed(0)
    cfg, images = config(width), torch.rand(2, 3, 8, 8)
    model = build_fresh(cfg).eval()
    model(images)
    found = comb(model, images)
    small: Any = slim(model, found, random_keep(found, 0.6, 0))
    small.more.weight = small.fc.weight
    plan = structure(build_fresh(cfg), small)
    if empty := [key for key, entries in plan.items() if not entries]:
        raise RuntimeError(f'the structure has no {empty[0]}, so that nothing would be tried there')
    save_slim(path, small, plan, {'input_shape': [3, 8, 8], 'dataset_meta': {'classes': ['a', 'b', 'c']}})
    return cfg, sum(t.nbytes for t in weights(model).values())


# -- load, and watch ---------------------------------------------------------------------------------------------------
def attempt(cfg: Config, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Load a file in both ways; return for each how it ended, and the weights."""
    ways: list[Callable[[], nn.Module]] = [
        lambda: load_slim(cfg, path),
        lambda: MODELS.build({'type': 'mmcpd.slimmed', 'model': cfg.model, 'structure': str(path)}),
    ]
    ends: list[tuple[str, dict[str, Any]]] = []
    for way in ways:
        try:
            with within(SECONDS):
                ends.append(('loaded', weights(way())))
        except SlimError as error:
            one = str(error).isprintable() and len(str(error)) < 3000
            ends.append(('SlimError' if one else f'SlimError of several lines: {str(error)[:300]!r}', {}))
        except Slow:
            ends.append((f'nothing after {SECONDS} s', {}))
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            ends.append((f'{type(error).__name__}: {str(error)[:300]}', {}))
    return ends


def memory(key: str) -> int:
    """Return a value of this process's status in bytes: VmRSS, or its peak VmHWM."""
    text = Path('/proc/self/status').read_text()
    return int(re.search(rf'{key}:\s+(\d+)', text).group(1)) * 1024  # type: ignore[union-attr]


def run(damage: Damage, count: int, seed: int, cfg: Config, size: int, original: Path) -> dict[str, Any]:
    """Try a number of damaged files; return what happened."""
    want, data, path = weights(load_slim(cfg, original)), original.read_bytes(), original.with_name('damaged.pth')
    ends, other = Counter[str](), dict[str, int]()
    slowest = peak = 0.0
    for number in range(count):
        path.write_bytes(damage.change(data, random.Random(f'{seed} {number}')))
        Path('/proc/self/clear_refs').write_text('5')  # the peak is now what is used now
        before, start = memory('VmRSS'), time.perf_counter()
        results = attempt(cfg, path)
        slowest = max(slowest, time.perf_counter() - start)
        peak = max(peak, (memory('VmHWM') - before) / size)
        for end, values in results:
            if end == 'loaded' and damage.same and not same(values, want):
                end = 'unnoticed'
            ends[end if end in ('loaded', 'SlimError', 'unnoticed') else 'anything else'] += 1
            if end not in ('loaded', 'SlimError'):
                other.setdefault(end, number)
    return {
        'tried': count, 'loads': sum(ends.values()), 'loaded': ends['loaded'], 'SlimError': ends['SlimError'],
        'unnoticed': ends['unnoticed'], 'anything_else': ends['anything else'],
        'examples': dict(list(other.items())[:20]),
        'slowest_seconds': round(slowest / len(results), 3), 'peak_memory_over_model': round(peak, 2),
    }  # fmt: skip


def same(values: dict[str, Any], want: dict[str, Any]) -> bool:
    """Say whether a model has these weights, bit for bit."""
    return values.keys() == want.keys() and all(torch.equal(values[name], want[name]) for name in want)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--structures', type=int, default=10_000)
    parser.add_argument('--files', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--width', type=int, default=128)
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=UserWarning)  # torch's, of sparse tensors
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'slim.pth'
        cfg, size = write(path, args.width)
        found: dict[str, Any] = {'seed': args.seed, 'torch': torch.__version__, 'model_bytes': size}
        for name, damage in (STRUCTURES | FILES).items():
            count = args.structures if name in STRUCTURES else -(-args.files // len(FILES))
            found[name] = run(damage, count, args.seed, cfg, size, path)
            print(name, json.dumps(found[name], indent=2), flush=True)
    args.out.write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
