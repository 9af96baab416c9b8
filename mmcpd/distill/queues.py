"""Class-aware ring buffers of embeddings: what goes in, what comes out, and whether they fit."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Labelled = tuple[Tensor, Tensor]  # class of each row (rows,), embedding of each row (rows, C)


def collect(teacher: Tensor, labels: Tensor, valid: Tensor, classes: int, at_most: int) -> tuple[Labelled, Labelled]:
    """Choose from each image, for each class in it, up to `at_most` pixels of that class, and its mean."""
    none = teacher.new_zeros(0, teacher.shape[1])
    pixels, regions = [none], [none]
    found: list[int] = []  # the class of each entry
    for features, label, ok in zip(teacher, labels, valid, strict=True):
        rows = features.flatten(1).T[ok.flatten()]  # (labelled pixels, C_T)
        label = label[ok]
        for c in label.unique().tolist():
            if not 0 <= c < classes:
                raise ValueError(f'CIRKDLoss: label {c} is not in [0, {classes}); set num_classes or ignore_index')
            of_class = rows[label == c]
            found.append(c)
            pixels.append(of_class[torch.randperm(len(of_class), device=rows.device)[:at_most]])
            regions.append(F.normalize(of_class.mean(0, keepdim=True), dim=1))
    of_regions = teacher.new_tensor(found, dtype=torch.long)
    of_pixels = of_regions.repeat_interleave(teacher.new_tensor([len(rows) for rows in pixels[1:]], dtype=torch.long))
    return (of_pixels, torch.cat(pixels)), (of_regions, torch.cat(regions))


def write(queue: Tensor, written: Tensor, classes: Tensor, rows: Tensor) -> None:
    """Write rows into the ring of their class: queue `(K, Q, C)`, written `(K,)`, classes `(rows,)`."""
    size = queue.shape[1]
    for c in classes.unique().tolist():
        new = rows[classes == c]
        start = int(written[c]) + max(0, len(new) - size)
        kept = new[-size:]
        slots = (start + torch.arange(len(kept), device=queue.device)) % size
        queue[c, slots] = kept.to(queue.dtype)
        written[c] += len(new)


def sample_keys(queue: Tensor, written: Tensor, per_class: int) -> Tensor:
    """Sample keys `(keys, C)` by one set of slots for all classes, less the slots that a class never wrote.

    The queue is `(K, Q, C)`, `written` counts the rows ever written to each class, `(K,)`.
    """
    filled = written.clamp(max=queue.shape[1])
    slots = torch.randperm(int(filled.max()), device=queue.device)[:per_class]
    return queue[:, slots][slots < filled.unsqueeze(1)]  # (K, slots, C), of which those that hold a key


def gather(x: Tensor) -> Tensor:
    """Concatenate `(rows, ...)` of all processes, of which each may have another number, by rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = max(int(c) for c in counts)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])


def check_memory(num_classes: int, pixel_queue: int, region_queue: int, channels: int) -> None:
    """Refuse queues that do not fit, on the CPU where they are made or the GPU where they will go.

    Raises:
        MemoryError: With the bytes needed, the bytes there are, and the lengths that would fit.
    """
    row = num_classes * channels * 4  # bytes of one slot over all classes
    needed = row * (pixel_queue + region_queue)
    for where, free in available_memory().items():
        if needed > free:
            fits = max(0, int(free * 0.5) // row - region_queue)
            raise MemoryError(
                f'CIRKDLoss: the queues need {needed:,} bytes ({num_classes} classes x ({pixel_queue} pixels '
                f'+ {region_queue} regions) x {channels} channels x 4 bytes), {where} has {free:,} available. '
                + (f'Set pixel_queue to {fits} or less' if fits else 'Set smaller pixel_queue and region_queue')
                + ', or beta=gamma=0 for the batch term alone.'
            )


def available_memory() -> dict[str, int]:
    """Return the bytes that can be had: of the CPU (within its control group), and of the current GPU."""
    found = {}
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        lines = dict(line.split(':') for line in meminfo.read_text().splitlines())
        found['the CPU'] = int(lines['MemAvailable'].split()[0]) * 1024
    limit, used = Path('/sys/fs/cgroup/memory.max'), Path('/sys/fs/cgroup/memory.current')
    if limit.exists() and used.exists() and limit.read_text().strip() != 'max':
        free = int(limit.read_text()) - int(used.read_text())
        found['the CPU'] = min(found.get('the CPU', free), max(0, free))
    if torch.cuda.is_available():
        found['the GPU'] = torch.cuda.mem_get_info()[0]
    return found
