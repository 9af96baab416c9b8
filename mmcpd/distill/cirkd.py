"""Cross-image relational distillation: pixels compared with those of other images, now and in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import DistillLoss, _kl_rows, _mean, _positive, _rows
from .queues import check_memory, collect, gather, sample_keys, write


class CIRKDLoss(DistillLoss):
    r"""Compare relations between pixels, within the batch and with queues of what the teacher saw before.

    On the features before the classifier, `(N, C, H, W)`, normalised over C, the sum of three terms:

    - `alpha` * batch pixel to pixel: for all ordered pairs of images (i, j), `softmax(F_i^T F_j / tau)` by
      row, `KL(T || S)`, mean over rows and pairs. Maps of more than `max_positions` are average-pooled first. Widths
      may differ: the student is not projected here.
    - `beta` * memory pixel to pixel, `gamma` * memory pixel to region: the student's pixels go through a
      projection head; both networks are compared with the same teacher embeddings, sampled from class-aware
      queues: `softmax(F^T keys / tau / temperature)` by row, `KL(T || S) * temperature^2`, mean over the labelled
      pixels.

    The queues are ring buffers and part of the state dict. In training each call first writes this batch's
    teacher embeddings (from all processes) into them: for each image and class one region, the normalised
    mean feature, and up to `pixels_per_image` random pixels **of that class**. Slots that were never written
    are never keys. The three terms are also left unweighted and detached in `terms`, for who wants to look.

    Memory: the queues take `num_classes * (pixel_queue + region_queue) * teacher_channels * 4` bytes (20,000
    pixels and 2,000 regions at 150 classes, 512 channels: 6.8 GB), checked before they are made. Activations:
    about `12 * N^2 * P^2` bytes for the first term with P = min(H * W, max_positions), `12 * N * H * W *
    keys` bytes for the others with about `pixel_keys + region_keys` keys. Time: the same counts times C
    multiply-adds.

    Args:
        num_classes: K, the number of labels.
        student_channels, teacher_channels: Widths of the features; the teacher's is as the student's by default.
        alpha, beta, gamma: Weights of the terms; with beta and gamma 0 there are no queues, and no labels are needed.
        tau: Contrast temperature.
        temperature: T of the distillation in the memory terms.
        pixel_queue, region_queue: Embeddings kept per class; 2,000 pixels where memory is short.
        pixels_per_image: Pixels written per image and class, at most.
        pixel_keys, region_keys: About how many keys to compare with, `pixel_keys // K + 1` per class.
        max_positions: Pool maps of the first term to at most this many positions.
        ignore_index: Pixels with this label are neither compared with the queues nor written into them.
        loss_weight: Factor of the sum.

    Raises:
        ValueError: If an argument is out of range, or a label in the data is.
        MemoryError: If the queues do not fit into the available memory.

    Source: Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022,
        eqs. 3 to 12.

    Example:
        >>> loss = CIRKDLoss(num_classes=4, student_channels=8, pixel_queue=64, region_queue=16)
        >>> x = torch.randn(2, 8, 6, 6)
        >>> loss(x, x, torch.randint(0, 4, (2, 12, 12))).shape
        torch.Size([])
    """

    same_channels = False
    pixel_queue: Tensor
    region_queue: Tensor
    pixel_written: Tensor
    region_written: Tensor

    def __init__(
        self,
        num_classes: int,
        student_channels: int,
        teacher_channels: int | None = None,
        alpha: float = 1.0,
        beta: float = 0.1,
        gamma: float = 0.1,
        tau: float = 0.1,
        temperature: float = 1.0,
        pixel_queue: int = 20000,
        region_queue: int = 2000,
        pixels_per_image: int = 16,
        pixel_keys: int = 4096,
        region_keys: int = 1024,
        max_positions: int = 1024,
        ignore_index: int = 255,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, ignore_index)
        counts = {
            'num_classes': num_classes,
            'student_channels': student_channels,
            'pixel_queue': pixel_queue,
            'region_queue': region_queue,
            'pixels_per_image': pixels_per_image,
            'max_positions': max_positions,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f'CIRKDLoss: {name} must be at least 1, got {count}')
        self.num_classes = num_classes
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.tau, self.temperature = _positive(tau, 'tau', self), _positive(temperature, 'temperature', self)
        self.pixels_per_image, self.max_positions = pixels_per_image, max_positions
        # Those of each class.
        self.pixel_keys, self.region_keys = pixel_keys // num_classes + 1, region_keys // num_classes + 1
        self.terms: dict[str, Tensor] = {}
        if self.needs_labels:
            width = teacher_channels or student_channels
            self.projection = nn.Sequential(
                nn.Conv2d(student_channels, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 1),
            )
            check_memory(num_classes, pixel_queue, region_queue, width)
            self.register_buffer('pixel_queue', torch.zeros(num_classes, pixel_queue, width))
            self.register_buffer('region_queue', torch.zeros(num_classes, region_queue, width))
            # How often a class was written: the next slot is this modulo the queue's length.
            self.register_buffer('pixel_written', torch.zeros(num_classes, dtype=torch.long))
            self.register_buffer('region_written', torch.zeros(num_classes, dtype=torch.long))

    @property
    def needs_labels(self) -> bool:
        return self.beta != 0 or self.gamma != 0

    @property
    def local_buffers(self) -> list[str]:
        """Name the buffers that are equal on all processes by themselves, and too large to be broadcast."""
        return [name for name, _ in self.named_buffers(recurse=False)]

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor:
        batch = self.batch_term(student, teacher) if self.alpha else student.sum() * 0
        self.terms = {'batch': batch.detach()}
        total = self.alpha * batch
        if labels is not None and valid is not None:
            pixel, region = self.memory_terms(student, teacher, labels, valid)
            self.terms.update(pixel=pixel.detach(), region=region.detach())
            total = total + self.beta * pixel + self.gamma * region
        return total

    def batch_term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare every pixel with those of each image: `(N, C_S, H, W)` and `(N, C_T, H, W)`, a scalar."""
        similarity = []
        for features in (student, teacher):
            x = F.normalize(_pool(features, self.max_positions), dim=1)
            rows = _rows(x, None)  # (N * P, C)
            similarity.append((rows @ rows.T / self.tau).view(len(rows), len(x), -1))  # (N * P, N, P)
        return _kl_rows(*similarity).mean()

    def memory_terms(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Compare labelled pixels with keys from the queues: `(N, C, H, W)` twice, `(N, H, W)` twice."""
        width = self.pixel_queue.shape[-1]
        if teacher.shape[1] != width:
            raise ValueError(
                f'CIRKDLoss holds embeddings of {width} channels, the teacher has {teacher.shape[1]}: '
                f'set teacher_channels={teacher.shape[1]}'
            )
        dtype = self.pixel_queue.dtype
        student = F.normalize(self.projection(student.to(dtype)), dim=1)
        teacher = F.normalize(teacher.to(dtype), dim=1)
        if self.training:
            self.enqueue(teacher, labels, valid)
        s, t = _rows(student, valid), _rows(teacher, valid)  # (anchors, C_T)
        scale = self.tau * self.temperature
        terms = []
        for keys in (
            sample_keys(self.pixel_queue, self.pixel_written, self.pixel_keys),
            sample_keys(self.region_queue, self.region_written, self.region_keys),
        ):
            rows = _kl_rows(s @ keys.T / scale, t @ keys.T / scale) if len(keys) else s[:0]
            terms.append(_mean(rows, student) * self.temperature**2)
        return terms[0], terms[1]

    @torch.no_grad()
    def enqueue(self, teacher: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Write a batch's normalised features `(N, C_T, H, W)`, of all processes, into the queues of their labels.

        Labels are `(N, H, W)`, and ignored where `valid`, of that shape, is False.

        Raises:
            ValueError: If a label is neither ignored nor in `[0, num_classes)`.
        """
        pixels, regions = collect(teacher, labels, valid, self.num_classes, self.pixels_per_image)
        write(self.pixel_queue, self.pixel_written, *map(gather, pixels))
        write(self.region_queue, self.region_written, *map(gather, regions))


def _pool(x: Tensor, max_positions: int) -> Tensor:
    """Average-pool `(N, C, H, W)` by the smallest factor that leaves at most `max_positions`."""
    h, w = x.shape[2:]
    factor = 1
    while math.ceil(h / factor) * math.ceil(w / factor) > max_positions:
        factor += 1
    return x if factor == 1 else F.avg_pool2d(x, factor, ceil_mode=True)
