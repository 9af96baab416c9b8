"""Let a config's model predict by an ONNX file in ONNX Runtime: its own loaders, samples and metrics stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F

from mmcpd.cli.common import UserError
from mmcpd.deploy import Normalization, read_metadata
from mmcpd.deploy.latency import usable_cores
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
    """Let a classifier or a segmentor compute its logits by an ONNX file, in place.

    Features are then the pictures, and the head that makes logits of them runs the file; what the model makes of the
    logits is its own code. A file's scores and class maps become logits that lead to the same predictions. Returns a
    check that the file was run, for after the test.

    Raises:
        UserError: the model is of another kind, or the file is one that `mmcpd deploy` did not write.
    """
    whole = cast(Any, unwrapped(model))
    heads = getattr(whole, 'decode_head', None) or getattr(whole, 'head', None)
    chain: list[Any] = [*heads] if isinstance(heads, nn.ModuleList) else [heads]
    refusal = UserError(
        f'{path}: ONNX files are tested for classifiers and segmentors whose head makes the logits, and '
        f'{type(whole).__name__} is none; test its slim.pth'
    )
    if not hasattr(whole, 'extract_feat') or not all(hasattr(head, 'predict') for head in chain):
        raise refusal
    run = _File(path, getattr(chain[-1], 'out_channels', 0))
    whole.extract_feat = _first
    for head in chain[:-1]:
        head.forward = _first
    chain[-1].forward = run

    def check() -> None:
        if not run.calls:
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
    """Compute logits of preprocessed pictures (N, C, H, W) by an ONNX file."""

    def __init__(self, path: str, number: int) -> None:
        metadata = read_metadata(path)
        output = metadata.get('output')
        if output not in LOGITS:
            raise UserError(f'{path} returns {output}, and only {", ".join(LOGITS)} can be tested')
        self.path, self.number, self.calls, self.logits = path, number, 0, LOGITS[output]
        try:
            self.before = _normalization(metadata)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}: what it says of its normalisation is damaged ({type(error).__name__}: {error}); export it '
                'again by mmcpd deploy'
            ) from error
        self.session = open_session(path, usable_cores())
        batch = self.session.get_inputs()[0].shape[0]
        self.batch = batch if isinstance(batch, int) else None

    def __call__(self, pictures: Tensor, *_rest: Any, **_options: Any) -> Tensor:
        """Return logits.

        Raises:
            UserError: the file does not run on pictures of this size.
        """
        self.calls += 1
        inputs = pictures if self.before is None else self.before.undone(pictures)
        parts = inputs.split(self.batch or len(inputs))
        try:
            outputs = [self._run(part) for part in parts]
        except RUN_ERRORS as error:
            raise UserError(
                f'{self.path} does not run on the data, {"x".join(map(str, pictures.shape))} after preprocessing '
                f'({first_line(error)}): export it with --shape or --size-dynamic'
            ) from error
        return self.logits(torch.cat(outputs), self.number).to(pictures.device)

    def _run(self, pictures: Tensor) -> Tensor:
        """Run one batch; the last of a file with a fixed batch size is filled up with its last picture."""
        number = len(pictures)
        if self.batch is not None and number < self.batch:
            pictures = torch.cat([pictures, pictures[-1:].expand(self.batch - number, -1, -1, -1)])
        return torch.from_numpy(self.session.run(None, feed(self.session, pictures))[0])[:number]
