"""What the accuracy tables measure on: a dense model, its pictures, and how a model of its kind is trained and scored.

Pictures of CIFAR-10 come from class folders, `data/cifar10/{train,test}/<class>/*.png`, and are read once into one file
of uint8 tensors. 5,000 training pictures are held out: nothing is trained, scored or refitted on them, learning rates
are chosen on them. Only the reported accuracy is taken on the test pictures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmcpd.engine.build import build_dense

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'cpd'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 5000
PAD = 4  # pixels on each side, before a random crop


class Batch(NamedTuple):
    """Pictures (N, 3, H, W), normalised, and their labels: (N,) or (N, H, W)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, 3, H, W) uint8 with labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Tensor) -> Pictures:
        return Pictures(self.images[which], self.labels[which])

    def to(self, device: str) -> Pictures:
        return Pictures(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Split:
    """The three disjoint sets of pictures that a table needs."""

    train: Pictures
    held_out: Pictures
    test: Pictures

    def to(self, device: str) -> Split:
        return Split(*(part.to(device) for part in (self.train, self.held_out, self.test)))


class Task(ABC):
    """One dense model on one data set.

    Attributes:
        name: the table's name.
        metric: what `evaluate` returns, in words.
        classifier: path of the layer whose outputs nobody may prune.
        shares: of the dense model's MACs that may remain.
        trained_share: the one that is trained after pruning.
        budgets: iterations of training.
        tried: iterations after which learning rates are compared; other budgets take the rate of the nearest.
        rates: learning rates to choose from, and the one that is used where nothing was chosen.
        score_pictures: how many pictures a score sees.
        batch: pictures of one training iteration.
    """

    name: str
    metric: ClassVar[str]
    classifier: ClassVar[str]
    shares: tuple[float, ...]
    trained_share: float
    budgets: tuple[int, ...]
    tried: tuple[int, ...]
    rates: tuple[float, ...]
    default_rate: float
    score_pictures: int
    batch: int

    @abstractmethod
    def dense(self) -> nn.Module:
        """Return a fresh dense model with its trained weights, in eval mode."""

    @abstractmethod
    def example(self) -> Tensor:
        """Return one picture (1, 3, H, W) to comb and to count MACs with."""

    @abstractmethod
    def plain(self, count: int, seed: int) -> list[Batch]:
        """Return random training pictures as the model is tested on, in batches."""

    @abstractmethod
    def augmented(self, count: int, seed: int) -> list[Tensor]:
        """Return random training pictures as the model is trained on, in batches."""

    @abstractmethod
    def stream(self, seed: int) -> Iterator[Batch]:
        """Yield augmented training batches without end."""

    @abstractmethod
    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Return the optimizer of short training."""

    @abstractmethod
    def evaluate(self, model: nn.Module, *, held_out: bool = False) -> float:
        """Return the metric on the test pictures, or on the held-out training pictures, percent."""

    def tried_for(self, iterations: int) -> int:
        """Return the budget at which the learning rate of another is chosen: the nearest, as a ratio."""
        return min(self.tried, key=lambda tried: abs(math.log(tried / max(iterations, 1))))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the label loss of each sample (N,); maps (N, C, h, w) are resized to their labels."""
        if outputs.ndim == 4:
            outputs = F.interpolate(outputs, labels.shape[1:], mode='bilinear', align_corners=False)
            found = F.cross_entropy(outputs, labels, ignore_index=255, reduction='none').flatten(1)
            return found.sum(1) / (labels != 255).flatten(1).sum(1).clamp(min=1)
        return F.cross_entropy(outputs, labels, reduction='none')


def normalised(images: Tensor) -> Tensor:
    """Map uint8 pictures (N, 3, H, W) to what the models were trained on."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def cropped_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random crop of each picture (N, 3, S, S) after zero padding, half of them mirrored."""
    n, _, size, _ = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    top, left = (torch.randint(2 * PAD + 1, (n, 1), generator=generator) for _ in range(2))
    rows, columns = (offset + torch.arange(size) for offset in (top, left))  # (N, S)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = (each.to(images.device) for each in (rows, torch.where(flip, columns.flip(1), columns)))
    number = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[number, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------
def read_folders(folder: Path) -> Pictures:
    """Read class folders of PNG files; classes count in the order of their names.

    Raises:
        ValueError: there are none.
    """
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((folder / name).glob('*.png'))]
    if not files:
        raise ValueError(f'{folder} has no class folders with .png files: put CIFAR-10 there, or give --data')
    images = np.stack([np.asarray(Image.open(file).convert('RGB')) for file, _ in files])  # (N, 32, 32, 3)
    labels = torch.tensor([label for _, label in files])
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def load_cifar(folder: Path, cache: Path) -> Split:
    """Return CIFAR-10 as tensors, from the cache if it is there; always the same pictures are held out."""
    if not cache.is_file():
        found = {name: read_folders(folder / name) for name in ('train', 'test')}
        cache.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: {'images': part.images, 'labels': part.labels} for name, part in found.items()}
        part_file = cache.with_suffix('.part')
        torch.save(plain, part_file)
        part_file.replace(cache)
    stored = torch.load(cache, weights_only=True)
    train, test = (Pictures(**stored[name]) for name in ('train', 'test'))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Split(train.take(order[:-HELD_OUT]), train.take(order[-HELD_OUT:]), test)


@dataclass(frozen=True)
class CifarTask(Task):
    """A classifier of CIFAR-10 with trained weights."""

    metric: ClassVar[str] = 'accuracy'
    classifier: ClassVar[str] = 'head.fc'
    name: str
    data: Split
    weights: Path
    adam: bool = False
    shares: tuple[float, ...] = (0.75, 0.5, 0.35)
    trained_share: float = 0.5
    budgets: tuple[int, ...] = (0, 40, 80, 240)
    tried: tuple[int, ...] = (80,)
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    default_rate: float = 0.01
    score_pictures: int = 1000
    batch: int = 128

    def dense(self) -> nn.Module:
        model = build_dense(CONFIGS / f'{self.name}_prune_cifar10.py')
        stored = torch.load(self.weights, weights_only=True)
        model.load_state_dict(stored.get('state_dict', stored))
        return model.to(self.data.train.images.device).eval()

    def example(self) -> Tensor:
        return normalised(self.data.train.images[:1])

    def plain(self, count: int, seed: int) -> list[Batch]:
        chosen = self._chosen(count, seed)
        pairs = zip(chosen.images.split(self.batch), chosen.labels.split(self.batch), strict=True)
        return [Batch(normalised(images), labels) for images, labels in pairs]

    def augmented(self, count: int, seed: int) -> list[Tensor]:
        chosen, generator = self._chosen(count, seed), torch.Generator().manual_seed(seed)
        return [normalised(cropped_and_flipped(part, generator)) for part in chosen.images.split(self.batch)]

    def _chosen(self, count: int, seed: int) -> Pictures:
        return self.data.train.take(_order(len(self.data.train), 1000 + seed)[:count])

    def stream(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for which in torch.randperm(len(self.data.train), generator=generator).split(self.batch):
                if len(which) == self.batch or len(which) == len(self.data.train):
                    part = self.data.train.take(which)
                    yield Batch(normalised(cropped_and_flipped(part.images, generator)), part.labels)

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, held_out: bool = False) -> float:
        model.eval()
        pictures = self.data.held_out if held_out else self.data.test
        right = 0
        for images, labels in zip(pictures.images.split(1000), pictures.labels.split(1000), strict=True):
            right += int((model(normalised(images)).argmax(1) == labels).sum())
        return 100 * right / len(pictures)


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def cifar_task(name: str, data: Split, weights: Path) -> CifarTask:
    """Return one of the CIFAR-10 tables' tasks; `weights` is a folder."""
    file = weights / f'{name}_cifar10.pth'
    if name == 'vit':
        rates = (1e-4, 3e-4, 1e-3)
        return CifarTask(name, data, file, True, rates=rates, default_rate=3e-4, score_pictures=512)
    if name == 'resnet20':  # 1053 iterations are 3 epochs
        return CifarTask(name, data, file, budgets=(0, 40, 80, 240, 1053), tried=(40, 80, 240))
    return CifarTask(name, data, file)
