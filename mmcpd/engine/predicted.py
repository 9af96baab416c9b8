"""Compare what the dense and the slim model predict on validation pictures: class by class, and drawn side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from mmcpd.engine.class_scores import Boxes, ByClass, accuracies, confusion, overlaps, precisions
from mmcpd.engine.drawings import as_picture, boxed, class_name, colours, enlarged, hexadecimal, veiled, view
from mmcpd.engine.evaluate import SPLITS
from mmcpd.report.data import ClassScore, Picture, Predictions, View
from mmcpd.slim.compare import evaluating

PICTURES, SHOWN = 500, 4


class Task(Protocol):
    """What a model predicts of a picture, collected from the samples that testing returns: dense and slim."""

    measure: str
    counted: str

    def add(self, dense: Any, slim: Any) -> None: ...
    def scores(self, classes: int) -> tuple[ByClass, ByClass]: ...
    def draw(self, picture: np.ndarray, names: Sequence[str], dense: Any, slim: Any) -> list[View]: ...


class Classifying:
    """One label for a picture."""

    measure, counted = 'accuracy, %', 'pictures'

    def __init__(self) -> None:
        self.truth: list[int] = []
        self.found: tuple[list[int], list[int]] = ([], [])

    @staticmethod
    def suits(sample: Any) -> bool:
        """Say whether a sample of testing has one label and one prediction."""
        return all(getattr(sample, name, torch.empty(0)).numel() == 1 for name in ('gt_label', 'pred_label'))

    def add(self, dense: Any, slim: Any) -> None:
        self.truth.append(int(dense.gt_label))
        for found, sample in zip(self.found, (dense, slim), strict=True):
            found.append(int(sample.pred_label))

    def scores(self, classes: int) -> tuple[ByClass, ByClass]:
        dense, slim = (accuracies(self.truth, found, classes) for found in self.found)
        return dense, slim

    def draw(self, picture: np.ndarray, names: Sequence[str], dense: Any, slim: Any) -> list[View]:
        called = {'label': dense.gt_label, 'dense': dense.pred_label, 'slim': slim.pred_label}
        words = ', '.join(f'{who}: {class_name(names, int(label))}' for who, label in called.items())
        return [view(words, enlarged(picture)[0])]


class Segmenting:
    """A class for each pixel."""

    measure, counted = 'IoU, %', 'pixels'

    def __init__(self) -> None:
        self.pairs: list[tuple[np.ndarray, ...]] = []
        self.confused: tuple[np.ndarray, ...] = ()
        self.classes = 0

    @staticmethod
    def suits(sample: Any) -> bool:
        """Say whether a sample of testing has labels and predictions of pixels."""
        return all(hasattr(sample, name) for name in ('gt_sem_seg', 'pred_sem_seg'))

    def add(self, dense: Any, slim: Any) -> None:
        truth, *found = _pixels(dense.gt_sem_seg), _pixels(dense.pred_sem_seg), _pixels(slim.pred_sem_seg)
        new = tuple(confusion(truth, each, self.classes) for each in found)
        self.confused = tuple(a + b for a, b in zip(self.confused, new, strict=True)) if self.confused else new

    def scores(self, classes: int) -> tuple[ByClass, ByClass]:
        dense, slim = (overlaps(pixels) for pixels in self.confused)
        return dense, slim

    def draw(self, picture: np.ndarray, names: Sequence[str], dense: Any, slim: Any) -> list[View]:
        drawn = {'labels': dense.gt_sem_seg, 'dense': dense.pred_sem_seg, 'slim': slim.pred_sem_seg}
        palette = colours(len(names))
        pictures = {'picture': picture, **{n: veiled(picture, _pixels(each), palette) for n, each in drawn.items()}}
        return [view(name, enlarged(each)[0]) for name, each in pictures.items()]


class Detecting:
    """Boxes, each with a class and a score."""

    measure, counted = 'AP at IoU 0.5, %', 'boxes'

    def __init__(self) -> None:
        self.truth: list[Boxes] = []
        self.found: tuple[list[Boxes], list[Boxes]] = ([], [])

    @staticmethod
    def suits(sample: Any) -> bool:
        """Say whether a sample of testing has labelled and predicted boxes: upright ones, with classes."""
        parts = [getattr(sample, name, None) for name in ('gt_instances', 'pred_instances')]
        labelled = all(part is not None and 'bboxes' in part and 'labels' in part for part in parts)
        return labelled and all(part.bboxes.shape[-1] == 4 for part in parts if part is not None)

    def add(self, dense: Any, slim: Any) -> None:
        self.truth.append(_boxes(dense.gt_instances))
        for found, sample in zip(self.found, (dense, slim), strict=True):
            found.append(_boxes(sample.pred_instances))

    def scores(self, classes: int) -> tuple[ByClass, ByClass]:
        dense, slim = (precisions(self.truth, found, classes) for found in self.found)
        return dense, slim

    def draw(self, picture: np.ndarray, names: Sequence[str], dense: Any, slim: Any) -> list[View]:
        drawn = {'labels': dense.gt_instances, 'dense': dense.pred_instances, 'slim': slim.pred_instances}
        large, scale = enlarged(picture)
        palette = colours(len(names))
        views = [view('picture', large)]
        for name, instances in drawn.items():
            boxes = _boxes(instances)
            scaled = Boxes(boxes.corners * scale, boxes.labels, boxes.scores)
            views.append(view(name, boxed(large, scaled, names, palette)))
        return views


TASKS = (Classifying, Segmenting, Detecting)


def _pixels(labels: Any) -> np.ndarray:
    return labels.data.squeeze(0).cpu().numpy()


def _boxes(instances: Any) -> Boxes:
    corners = instances.bboxes
    corners = getattr(corners, 'tensor', corners).cpu().numpy().astype(float).reshape(-1, 4)
    scores = instances.scores.cpu().numpy() if 'scores' in instances else np.ones(len(corners))
    return Boxes(corners, instances.labels.cpu().numpy(), scores)


@torch.no_grad()
def compare_predictions(
    dense: nn.Module,
    slim: nn.Module,
    cfg: Config,
    *,
    pictures: int = PICTURES,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions | None:
    """Test both models on a config's first validation pictures, at most so many; None where there are no labels.

    The models stay on their devices and in their modes.
    """
    split = next((each for each in SPLITS if cfg.get(f'{each}_dataloader')), None)
    if split is None:
        return None
    with ExitStack() as stack:
        stack.enter_context(DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')))
        for model in (dense, slim):
            stack.enter_context(evaluating(model))
        return _compare((dense, slim), _in_order(cfg[f'{split}_dataloader']), pictures, progress)


def _in_order(config: Any) -> DataLoader:
    """Build a loader of the whole data set in this process: MMEngine's samplers would divide it and wait for others."""
    options = dict(copy.deepcopy(config))
    dataset = DATASETS.build(options['dataset'])
    return Runner.build_dataloader({**options, 'dataset': dataset, 'sampler': SequentialSampler(dataset)})


def _compare(
    models: Sequence[Any], loader: Any, most: int, progress: Callable[[int, int], None] | None
) -> Predictions | None:
    total = min(most, len(loader.dataset))
    wanted = {total * (2 * number + 1) // (2 * SHOWN) for number in range(SHOWN)}
    names, task, seen = _names(getattr(loader.dataset, 'metainfo', None)), None, 0
    shown: list[Picture] = []
    for data in loader:
        if seen >= total:
            break
        # Testing writes into what it is given.
        samples = [model.test_step(copy.deepcopy(data)) for model in models]
        for inputs, dense, slim in list(zip(data['inputs'], *samples, strict=True))[: total - seen]:
            if task is None:
                kind = next((kind for kind in TASKS if kind.suits(dense)), None)
                if kind is None:
                    return None
                task, names = kind(), names or _numbered(models[0], dense)
                if isinstance(task, Segmenting):
                    task.classes = len(names)
            task.add(dense, slim)
            if seen in wanted:
                shown.append(Picture(f'Picture {seen + 1}', task.draw(_shown(inputs, dense), names, dense, slim)))
            seen += 1
        if progress is not None:
            progress(seen, total)
    return None if task is None else _predictions(task, names, shown, seen, len(loader.dataset))


def _predictions(task: Task, names: Sequence[str], shown: list[Picture], seen: int, total: int) -> Predictions:
    of_dense, of_slim = task.scores(len(names))
    drawn = [''] * len(names) if isinstance(task, Classifying) else hexadecimal(colours(len(names)))
    rows = zip(names, of_dense.counts, of_dense.scores, of_slim.scores, drawn, strict=True)
    classes = [ClassScore(name, int(count), _known(a), _known(b), colour) for name, count, a, b, colour in rows]
    which = f'all {total}' if seen == total else f'the first {seen} of {total}'
    data = f'By class on {which} validation pictures; the pictures are evenly spaced among them.'
    return Predictions(task.measure, task.counted, data, classes, shown)


def _known(score: float) -> float | None:
    return None if np.isnan(score) else float(score)


def _names(metainfo: Any) -> list[str]:
    """Return the names of the classes of a data set, none where it has none."""
    classes = (metainfo or {}).get('classes') or ()
    return [str(name) for name in ([classes] if isinstance(classes, str) else classes)]


def _numbered(model: Any, sample: Any) -> list[str]:
    """Return numbers as names, as many as the model has classes."""
    scores = getattr(sample, 'pred_score', None)
    heads = (getattr(model, name, None) for name in ('decode_head', 'bbox_head', 'head'))
    known = (getattr(head, 'num_classes', None) for head in heads)
    count = len(scores) if scores is not None else next(filter(None, known), 1)
    return [str(number) for number in range(int(count))]


def _shown(inputs: Any, sample: Any) -> np.ndarray:
    """Return the picture that was tested, at the size that predictions have, without what pads it."""
    values = inputs.cpu().numpy()
    height, width = sample.metainfo.get('img_shape', values.shape[-2:])[:2]
    size = tuple(sample.metainfo.get('ori_shape', (height, width))[:2])
    return as_picture(values[..., :height, :width], (int(size[0]), int(size[1])))
