"""Let a config's model predict by an ONNX file in ONNX Runtime: its own loaders, samples and metrics stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from mmcpd.cli.common import UserError
from mmcpd.deploy import Normalization, read_metadata
from mmcpd.deploy.latency import usable_cores
from mmcpd.deploy.metadata import BOXES
from mmcpd.deploy.onnx import feed, open_session
from mmcpd.deploy.parity import RUN_ERRORS
from mmcpd.engine.saving import drop_pruning
from mmcpd.engine.wrappers import student_config, unwrapped
from mmcpd.errors import first_line

SURE = 30.0  # a logit whose probability is one but for rounding
# How outputs become logits that lead to the same predictions; the number is that of the head's logits.
LOGITS: dict[str, Callable[[Tensor, int], Tensor]] = {
    'logits': lambda out, _: out,
    'softmax': lambda out, _: out.clamp(min=torch.finfo(out.dtype).tiny).log(),
    'sigmoid': lambda out, _: out.logit(eps=1e-7),
    'labels': lambda out, number: (
        F.one_hot(out.long(), number).movedim(-1, 1).float() if number > 1 else (out[:, None] - 0.5) * 2 * SURE
    ),
}


def use_dense(cfg: Config) -> None:
    """Make a config build its dense model, in place; an ONNX file will predict for it, so no weights are read."""
    cfg.model, cfg.load_from = student_config(cfg), None
    drop_pruning(cfg)


def run_file_(model: nn.Module, path: str) -> Callable[[], None]:
    """Let a model predict by an ONNX file, in place: a classifier's or segmentor's logits, a detector's boxes.

    Features are then the pictures, and the head that makes logits of them runs the file; what the model makes of the
    logits is its own code. A file's scores and class maps become logits that lead to the same predictions. Boxes are
    predictions as they are. Returns a check that the file was run, for after the test.

    Raises:
        UserError: the model is of another kind, or the file is one that `mmcpd deploy` did not write.
    """
    whole, file = cast(Any, unwrapped(model)), _File(path)
    if file.output == BOXES or hasattr(whole, 'add_pred_to_datasample'):
        return _find_boxes_(whole, file)
    return _compute_logits_(whole, file)


def _find_boxes_(detector: Any, file: _File) -> Callable[[], None]:
    """Let a detector predict by a file.

    Raises:
        UserError: it is no detector, or the file holds no boxes.
    """
    kind = type(detector).__name__
    if not hasattr(detector, 'add_pred_to_datasample'):
        raise UserError(f'{file.path} returns {BOXES}, and {kind} is no detector that could give them out')
    if file.output != BOXES:
        raise UserError(
            f"{file.path} returns {file.output}, of which {kind}'s boxes are not made here: export it with --boxes, or "
            'test its slim.pth'
        )
    pad_value = float(getattr(detector.data_preprocessor, 'pad_value', 0))
    detector.predict = _Detections(file, detector.add_pred_to_datasample, pad_value)

    def check() -> None:
        if not file.calls:
            raise UserError(f'{file.path}: {kind} predicts in another way than by `predict`; test its slim.pth')

    return check


def _compute_logits_(whole: Any, file: _File) -> Callable[[], None]:
    if file.output not in LOGITS:
        raise UserError(f'{file.path} returns {file.output}, and only {", ".join(LOGITS)} can be tested')
    heads = getattr(whole, 'decode_head', None) or getattr(whole, 'head', None)
    chain: list[Any] = [*heads] if isinstance(heads, nn.ModuleList) else [heads]
    refusal = UserError(
        f'{file.path}: ONNX files are tested for detectors, and for classifiers and segmentors whose head makes the '
        f'logits, and {type(whole).__name__} is none; test its slim.pth'
    )
    if not hasattr(whole, 'extract_feat') or not all(hasattr(head, 'predict') for head in chain):
        raise refusal
    run = _Logits(file, getattr(chain[-1], 'out_channels', 0))
    whole.extract_feat = _first
    for head in chain[:-1]:
        head.forward = _first
    chain[-1].forward = run

    def check() -> None:
        if not file.calls:
            raise refusal

    return check


def _first(pictures: Tensor, *_rest: Any, **_options: Any) -> Tensor:
    return pictures


def _normalization(metadata: Mapping[str, Any]) -> Normalization | None:
    """Return the normalisation inside of a file, by what the file says of itself."""
    given = metadata.get('normalization') or {}
    if not given.get('inside'):
        return None
    return Normalization(tuple(given['mean']), tuple(given['std']), given['flip'], metadata['input']['channels'])


class _File:
    """Run an ONNX file on preprocessed pictures (N, C, H, W)."""

    def __init__(self, path: str) -> None:
        metadata = read_metadata(path)
        self.path, self.output, self.calls = path, metadata.get('output'), 0
        try:
            self.before = _normalization(metadata)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}: what it says of its normalisation is damaged ({type(error).__name__}: {error}); export it '
                'again by mmcpd deploy'
            ) from error
        self.session = open_session(path, usable_cores())
        fixed = [size if isinstance(size, int) else None for size in self.session.get_inputs()[0].shape]
        self.batch, self.size = fixed[0], fixed[2:]  # numbers where they are fixed

    def __deepcopy__(self, memo: dict[int, Any]) -> _File:
        """Return itself: copies of a model, as `EMAHook` makes, predict by the same file."""
        return self

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """Return the outputs.

        Raises:
            UserError: the file does not run on pictures of this size.
        """
        self.calls += 1
        inputs = pictures if self.before is None else self.before.undone(pictures)
        parts = inputs.split(self.batch or len(inputs))
        try:
            outputs = [self._run(part) for part in parts]
        except RUN_ERRORS as error:
            other = '--shape, the largest height and width' if self.output == BOXES else '--shape or --size-dynamic'
            raise UserError(
                f'{self.path} does not run on the data, {"x".join(map(str, pictures.shape))} after preprocessing '
                f'({first_line(error)}): export it with {other}'
            ) from error
        return [torch.cat(each).to(pictures.device) for each in zip(*outputs, strict=True)]

    def _run(self, pictures: Tensor) -> list[Tensor]:
        """Run one batch; the last of a file with a fixed batch size is filled up with its last picture."""
        number = len(pictures)
        if self.batch is not None and number < self.batch:
            pictures = torch.cat([pictures, pictures[-1:].expand(self.batch - number, -1, -1, -1)])
        return [torch.from_numpy(each)[:number] for each in self.session.run(None, feed(self.session, pictures))]


class _Logits:
    """Compute logits of preprocessed pictures (N, C, H, W) by a file."""

    def __init__(self, file: _File, number: int) -> None:
        self.file, self.number = file, number

    def __call__(self, pictures: Tensor, *_rest: Any, **_options: Any) -> Tensor:
        return LOGITS[cast(str, self.file.output)](self.file(pictures)[0], self.number)


class _Detections:
    """Predict boxes by a file, in the pixels of the pictures that the data set has."""

    def __init__(self, file: _File, write: Callable[[Any, Any], Any], pad_value: float) -> None:
        self.file, self.write, self.pad_value = file, write, pad_value

    def __call__(self, pictures: Tensor, samples: Any, rescale: bool = True) -> Any:
        """Return the samples with what was found; pictures smaller than the file's are padded, as in a batch.

        Raises:
            UserError: they are larger, or a sample does not say how its picture was scaled.
        """
        room = [0 if size is None else size - its for size, its in zip(self.file.size, pictures.shape[2:], strict=True)]
        if min(room) >= 0:
            pictures = F.pad(pictures, (0, room[1], 0, room[0]), value=self.pad_value)
        found = zip(samples, *self.file(pictures), strict=True)
        return self.write(samples, [self._found(*each, rescale=rescale) for each in found])

    def _found(self, sample: Any, boxes: Tensor, scores: Tensor, labels: Tensor, *, rescale: bool) -> InstanceData:
        height, width = sample.img_shape[:2]
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
        there = (labels >= 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)  # in the padding there is nothing
        if rescale and 'scale_factor' not in sample:
            raise UserError(
                f'{self.file.path}: samples of the test data have no scale_factor: put a Resize before them'
            )
        if rescale:
            boxes = boxes / boxes.new_tensor([*sample.scale_factor] * 2)
        return InstanceData(bboxes=boxes[there], scores=scores[there], labels=labels[there])
