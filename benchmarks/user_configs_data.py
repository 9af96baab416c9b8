"""Write small folders of synthetic pictures and labels in the layouts that data set classes of OpenMMLab read.

A picture is coarse noise and a bright square; its place is the label, so that a few steps of training learn something.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, VAL = 20, 4  # pictures
SPLITS = {'train': TRAIN, 'val': VAL}


def picture(rng: np.random.Generator, height: int, width: int, bands: int) -> np.ndarray:
    """Return coarse noise as bytes, (H, W, bands).

    Example:
        >>> picture(np.random.default_rng(0), 30, 40, 4).shape
        (30, 40, 4)
    """
    coarse = rng.integers(0, 160, ((height + 7) // 8, (width + 7) // 8, bands), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


def write_pictures(root: Path, size: tuple[int, int], classes: int, bands: int = 3, seed: int = 0) -> None:
    """Write `img/SPLIT/NNN.png`, a second picture of the same place (`img2`), label maps (`ann`), and lists of labels.

    `SPLIT.txt` has a line with name and class for each picture, `SPLIT.json` several labels, `SPLIT_tasks.json` a label
    for each of two tasks. More or fewer than three bands go into `.npy` beside the pictures.

    Args:
        root: The folder.
        size: Height and width in pixels.
        classes: Number of classes.
        bands: Bands of the `.npy` files; with three none are written.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    for split, count in SPLITS.items():
        for kind in ('img', 'img2', 'ann', 'npy'):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        lines, several, tasks = [], [], []
        for number in range(count):
            label, name = number % classes, f'{number:03d}'
            pixels = picture(rng, *size, bands)
            marked = np.zeros(size, np.uint8)
            step = size[1] // min(classes, 8)
            at = (label % 8) * step
            marked[size[0] // 4 : size[0] // 2, at : at + max(step, 4)] = max(label, 1) % classes or classes - 1
            pixels[marked > 0] = 255
            _save(root, split, name, pixels, marked, rng)
            lines.append(f'{name}.png {label}')
            path = f'img/{split}/{name}.png'
            several.append({'img_path': path, 'gt_label': sorted({label, (label + 1) % classes})})
            tasks.append({'img_path': path, 'gt_label': {'kind': label, 'side': label % 2}})
        (root / f'{split}.txt').write_text('\n'.join(lines) + '\n')
        names = [f'c{n}' for n in range(classes)]
        (root / f'{split}.json').write_text(json.dumps({'metainfo': {'classes': names}, 'data_list': several}))
        (root / f'{split}_tasks.json').write_text(
            json.dumps({'metainfo': {'tasks': ['kind', 'side']}, 'data_list': tasks})
        )


def _save(root: Path, split: str, name: str, pixels: np.ndarray, marked: np.ndarray, rng: np.random.Generator) -> None:
    bands = pixels.shape[2]
    rgb = pixels[..., :3] if bands >= 3 else pixels[..., :1].repeat(3, 2)
    Image.fromarray(rgb).save(root / 'img' / split / f'{name}.png')
    before = np.where(marked[..., None] > 0, rng.integers(0, 160, rgb.shape, dtype=np.uint8), rgb)
    Image.fromarray(before).save(root / 'img2' / split / f'{name}.png')
    Image.fromarray(marked).save(root / 'ann' / split / f'{name}.png')
    if bands != 3:
        np.save(root / 'npy' / split / f'{name}.npy', pixels)
