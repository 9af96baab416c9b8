"""What comes before and after a model in its ONNX file, so that an application needs nothing but the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Ending = Callable[[Tensor, Tensor], Tensor]  # (the logits, the pictures) -> what the file returns


@dataclass(frozen=True)
class Normalization:
    """Make what a model takes of pictures (N, C, H, W) with values from 0 to 255: reorder channels, normalise.

    Attributes:
        mean, std: One for each channel, in the model's order.
        flip: Whether the model takes the channels in the reverse order.
        channels: The order of what is taken, `RGB`, `BGR`, or '' where it is not known.

    Example:
        >>> pictures = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
        >>> normalization = Normalization((127.5,) * 3, (50.0,) * 3, flip=True, channels='RGB')
        >>> bool((normalization.undone(normalization(pictures)) == pictures).all())
        True
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    channels: str

    def __call__(self, pictures: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (self.mean, self.std))
        pictures = pictures.flip(1) if self.flip else pictures
        return (pictures.float() - mean) / std

    def undone(self, normalized: Tensor) -> Tensor:
        """Return the pictures, uint8, that become these; exact where they were whole numbers."""
        mean, std = (torch.tensor(values, device=normalized.device)[:, None, None] for values in (self.mean, self.std))
        pictures = (normalized * std + mean).round().clamp(0, 255).to(torch.uint8)
        return pictures.flip(1) if self.flip else pictures


@dataclass(frozen=True)
class Scores:
    """Make probabilities of a classifier's logits (N, classes): by softmax, or of each class by itself.

    Example:
        >>> Scores()(torch.zeros(1, 2), images)
        tensor([[0.5000, 0.5000]])
    """

    sigmoid: bool = False

    def __call__(self, logits: Tensor, _pictures: Tensor) -> Tensor:
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)


@dataclass(frozen=True)
class ClassMap:
    """Make each pixel's class (N, H, W) of a segmentor's logits (N, classes, h, w), resized to the picture's size.

    Attributes:
        align_corners: As of the resize.
        threshold: With a single logit: above which probability a pixel is of class 1.

    Example:
        >>> ClassMap()(torch.randn(2, 5, 2, 2), torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8])
    """

    align_corners: bool = False
    threshold: float | None = None

    def __call__(self, logits: Tensor, pictures: Tensor) -> Tensor:
        size = pictures.shape[2:]
        logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=self.align_corners)
        if self.threshold is None:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > self.threshold).long()


@dataclass(frozen=True)
class WholeForward:
    """Call a model on pictures as a file does that holds what comes before and after it.

    Example:
        >>> whole = WholeForward(lambda model, x: model(x), after=Scores())
        >>> bool(whole(model, images).sum(1).allclose(torch.ones(2)))
        True
    """

    forward: Callable[..., Any]
    before: Normalization | None = None
    after: Ending | None = None

    def __call__(self, model: nn.Module, pictures: Tensor) -> Any:
        inputs = pictures if self.before is None else self.before(pictures)
        out = self.forward(model, inputs)
        return out if self.after is None else self.after(out, pictures)
