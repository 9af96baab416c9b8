"""Losses that pull a student towards a frozen teacher, each called as `loss(student, teacher)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8  # a norm below it gives no correlation


class DistillLoss(nn.Module):
    """Hold what all distillation losses share; a subclass writes `compare`.

    The teacher is detached, half precision becomes float32 and autocast is off inside, so that the result is finite
    whatever the precision of the models. A teacher's map `(N, C, H, W)` of another size is resized (bilinear).

    The result is multiplied by `loss_weight`. Positions whose label is `ignore_index` do not count; labels must then be
    given.

    Example:
        >>> class L1Loss(DistillLoss):
        ...     def compare(self, student, teacher, labels, valid):
        ...         return (student - teacher).abs().mean()
        >>> L1Loss(loss_weight=2.0)(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
        tensor(2.)
    """

    same_channels = True  # whether `compare` needs as many channels in the student as in the teacher

    def __init__(self, *, loss_weight: float = 1.0, ignore_index: int | None = None) -> None:
        super().__init__()
        if not loss_weight >= 0:
            raise ValueError(f'{type(self).__name__}: loss_weight must be >= 0, got {loss_weight}')
        self.loss_weight = float(loss_weight)
        self.ignore_index = ignore_index

    @property
    def needs_labels(self) -> bool:
        return self.ignore_index is not None

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compare a student's output with a teacher's: a scalar in float32 (float64 for float64 inputs).

        Args:
            student: `(N, C)`, `(N, L, C)` for tokens, or `(N, C, H, W)`.
            teacher: The same; its `(H, W)` may differ, and in some losses its C.
            labels: `(N,)`, or `(N, h, w)` or `(N, 1, h, w)` in any resolution, resized by nearest.

        Raises:
            ValueError: If the shapes do not fit, or labels are needed and not given.
        """
        student, teacher = _upcast(student), _upcast(teacher.detach())
        if student.ndim == 4 and teacher.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
            teacher = F.interpolate(teacher, student.shape[2:], mode='bilinear', align_corners=False)
        like = student.shape == teacher.shape if self.same_channels else student.ndim == teacher.ndim
        if not like or student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f'{type(self).__name__}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} '
                'do not fit; tap outputs of the same kind, and use FeatureLoss for features of unlike widths'
            )
        valid = None
        if self.needs_labels:
            if labels is None:
                raise ValueError(
                    f'{type(self).__name__} needs labels (ignore_index={self.ignore_index}): call it as '
                    'loss(student, teacher, labels)'
                )
            labels = _labels_like(labels, student, type(self).__name__)
            valid = None if self.ignore_index is None else labels != self.ignore_index
        with torch.autocast(student.device.type, enabled=False):
            return self.loss_weight * self.compare(student, teacher, labels, valid)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the unweighted loss; `labels` and `valid` are `(N,)` or `(N, H, W)` like the student."""
        raise NotImplementedError


class KDLoss(DistillLoss):
    r"""Compare class probabilities: `tau^2 * KL(softmax(t / tau) || softmax(s / tau))`, mean over samples.

    A sample is a row of `(N, C)`, a token of `(N, L, C)` or a pixel of `(N, C, H, W)`. With `sigmoid`, where each class
    is a question of its own (several labels, one channel), the KL divergence of yes and no, summed over the classes. By
    default that is so for one channel, whose softmax is always 1; a `Distiller` reads it from the loss of the head.

    The CPD paper gives no value of the temperature `tau`, nor of the weight. At half of a ResNet-20's MACs on CIFAR-10,
    240 iterations end at 88.0 % with the defaults, `tau=4` and the factor `tau^2` = 16; without that factor `tau=4`
    (85.8 %) is no better than `tau=1` (85.7 %), whose gradient diverges under the same 16. Samples whose label is
    `ignore_index` do not count (needs labels).

    Memory: four tensors of the logits' size. Time: O(elements).

    Raises:
        ValueError: If `tau` is not positive.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2; for `sigmoid`
        Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, section 3.2 (multi-label logits distillation).

    Example:
        >>> KDLoss(tau=2.0)(torch.zeros(4, 10), torch.zeros(4, 10))
        tensor(0.)
        >>> KDLoss(tau=1.0, sigmoid=True)(torch.zeros(4, 10), torch.ones(4, 10))
        tensor(1.1094)
    """

    def __init__(
        self,
        *,
        tau: float = 4.0,
        sigmoid: bool | None = None,
        loss_weight: float = 1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(loss_weight=loss_weight, ignore_index=ignore_index)
        if sigmoid not in (True, False, None):
            raise ValueError(f'KDLoss: sigmoid is True, False or None, got {sigmoid!r}')
        self.tau, self.sigmoid = _positive(tau, 'tau', self), sigmoid

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor:
        s, t = (_rows(x, valid) / self.tau for x in (student, teacher))
        by_class = s.shape[1] == 1 if self.sigmoid is None else self.sigmoid
        if by_class:  # a sigmoid is the softmax of a logit and 0
            s, t = (torch.stack([x, torch.zeros_like(x)], -1) for x in (s, t))  # (rows, classes, 2)
        rows = _kl_rows(s, t)
        rows = rows.sum(-1) if by_class else rows
        return _mean(rows, student) * self.tau**2


class CWDLoss(DistillLoss):
    r"""Compare where each channel looks: a softmax over the positions of every channel, `(N, C, H, W)`.

    `tau^2 / (N * C) * sum over n, c of KL(phi(t) || phi(s))`, where `phi(y)` is the softmax of `y / tau` over the H*W
    positions. A `tau` of 4 with weight 3 is the authors' command, 1 with weight 5 or 10 is common elsewhere. Pixels
    whose label is `ignore_index` are left out of the softmax (needs labels); as published, all count.

    Memory: four tensors of the map's size. Time: O(elements).

    Raises:
        ValueError: If `tau` is not positive, or the inputs have no positions.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, eqs. 3 and 4.

    Example:
        >>> CWDLoss(tau=4.0, loss_weight=3.0)(torch.zeros(2, 19, 8, 8), torch.zeros(2, 19, 8, 8))
        tensor(0.)
    """

    def __init__(self, *, tau: float = 4.0, loss_weight: float = 3.0, ignore_index: int | None = None) -> None:
        super().__init__(loss_weight=loss_weight, ignore_index=ignore_index)
        self.tau = _positive(tau, 'tau', self)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor:
        if student.ndim != 4:
            raise ValueError(f'CWDLoss compares maps (N, C, H, W), got {tuple(student.shape)}: tap a convolution')
        s, t = (x.flatten(2) / self.tau for x in (student, teacher))  # (N, C, H*W)
        if valid is not None:
            left_out = ~valid.flatten(1).unsqueeze(1)  # (N, 1, H*W)
            # A finite floor, not -inf: 0 * inf would be nan, and an image with no valid pixel must give 0.
            floor = torch.finfo(s.dtype).min / 4
            s, t = s.masked_fill(left_out, floor), t.masked_fill(left_out, floor)
        return _kl_rows(s, t).mean() * self.tau**2


class DISTLoss(DistillLoss):
    r"""Compare relations, not values: `1 - Pearson correlation` of the probabilities, by sample and by class.

    `tau^2 * (beta * inter + gamma * intra)`. inter: the mean over samples (pixels) of 1 - corr(row of s, row of t).
    intra: the mean over classes of 1 - corr(column of s, column of t). A row or column that is constant in the teacher
    (norm of the centred vector below 1e-8) has no correlation and counts as agreement.

    MMRazor prunes ResNet-50 with a `loss_weight` of 2. Samples labelled `ignore_index` do not count (needs labels).

    Memory: six tensors of the logits' size. Time: O(elements).

    Raises:
        ValueError: If `tau` is not positive.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, eqs. 6 to 10.

    Example:
        >>> x = torch.randn(4, 10)
        >>> bool(DISTLoss()(x, x) < 1e-6)
        True
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(loss_weight=loss_weight, ignore_index=ignore_index)
        self.beta, self.gamma, self.tau = beta, gamma, _positive(tau, 'tau', self)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor:
        s = (_rows(student, valid) / self.tau).softmax(-1)  # (rows, classes)
        t = (_rows(teacher, valid) / self.tau).softmax(-1)
        if len(s) == 0:
            return student.sum() * 0
        inter, intra = _unlike(s, t, dim=1), _unlike(s, t, dim=0)
        return self.tau**2 * (self.beta * inter.mean() + self.gamma * intra.mean())


class FeatureLoss(DistillLoss):
    r"""Compare features by their mean squared difference, through a 1x1 projection where the widths differ.

    Takes `(N, C)`, `(N, L, C)` or `(N, C, H, W)`. The projection is trained with the student and is no part of it.
    `teacher_channels` is as `student_channels` by default; without both, any widths that are alike. Rows labelled
    `ignore_index` do not count (needs labels). Memory: three tensors of the teacher's feature size and
    `(student_channels + 1) * teacher_channels` parameters. Time: O(elements), projected times `student_channels`.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3, as a mean over elements.

    Example:
        >>> FeatureLoss(16, 32)(torch.zeros(2, 16, 4, 4), torch.zeros(2, 32, 4, 4)).shape
        torch.Size([])
    """

    same_channels = False

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        loss_weight: float = 1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(loss_weight=loss_weight, ignore_index=ignore_index)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels or student_channels
        if not student_channels and teacher_channels:
            raise ValueError(f'FeatureLoss: teacher_channels={teacher_channels} is given, and student_channels is not')
        self.projection: nn.Module = nn.Identity()
        if student_channels and teacher_channels and student_channels != teacher_channels:
            self.projection = nn.Linear(student_channels, teacher_channels)  # on rows it is the 1x1 convolution

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor:
        s, t = _rows(student, valid), _rows(teacher, valid)  # (rows, C)
        if (s.shape[1], t.shape[1]) != (self.student_channels or s.shape[1], self.teacher_channels or s.shape[1]):
            widths = f'a student of {s.shape[1]} and a teacher of {t.shape[1]} channels'
            ours = f'FeatureLoss({self.student_channels}, {self.teacher_channels})'
            raise ValueError(f'{ours} got {widths}: set student_channels and teacher_channels to these')
        if isinstance(self.projection, nn.Linear):
            s = self.projection(s.to(self.projection.weight.dtype))
        if len(s) == 0:
            return s.sum() + student.sum() * 0
        return (s - t).square().mean()


def _positive(value: float, name: str, owner: nn.Module) -> float:
    if not value > 0:
        raise ValueError(f'{type(owner).__name__}: {name} must be > 0, got {value}')
    return float(value)


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """Lay out `(N, C)`, `(N, L, C)` or `(N, C, H, W)` as rows `(n, C)`, less those that are not valid."""
    x = x.movedim(1, -1) if x.ndim == 4 else x
    rows = x.reshape(-1, x.shape[-1])
    return rows if valid is None else rows[valid.flatten()]


def _kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `KL(softmax(teacher) || softmax(student))` over the last dimension."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction='none', log_target=True).sum(-1)


def _mean(rows: Tensor, like: Tensor) -> Tensor:
    """Average the rows; none at all give a zero that still has a gradient."""
    return rows.mean() if len(rows) else like.sum() * 0


def _unlike(s: Tensor, t: Tensor, dim: int) -> Tensor:
    """Return `1 - Pearson correlation` along `dim`, 0 where the teacher is constant."""
    s, t = s - s.mean(dim, keepdim=True), t - t.mean(dim, keepdim=True)
    corr = F.cosine_similarity(s, t, dim=dim, eps=EPS)
    return torch.where(t.norm(dim=dim) < EPS, torch.zeros_like(corr), 1 - corr)


def _labels_like(labels: Tensor, features: Tensor, owner: str) -> Tensor:
    """Bring labels to `(N,)` for `(N, C)` features and to `(N, H, W)`, by nearest, for maps."""
    n, hw = features.shape[0], features.shape[2:]
    if features.ndim == 2 and labels.shape == (n,):
        return labels
    if features.ndim == 4:
        maps = labels.unsqueeze(1) if labels.ndim == 3 else labels  # (N, 1, h, w)
        if maps.ndim == 4 and maps.shape[:2] == (n, 1):
            # float32 holds every integer up to 2^24, far more than any number of classes
            return F.interpolate(maps.float(), hw, mode='nearest').squeeze(1).to(labels.dtype)
    raise ValueError(
        f'{owner}: labels {tuple(labels.shape)} do not fit features {tuple(features.shape)}; give (N,) for '
        'vectors and (N, h, w) for maps'
    )
