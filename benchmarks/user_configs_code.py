"""Stand for the Python modules beside users' configs: what they register there (`custom_imports`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS, TRANSFORMS
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset


@TRANSFORMS.register_module()
class LoadBands:
    """Load the `.npy` of a picture: as many bands as it has."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        path = Path(results['img_path'])
        image = np.load(path.parents[2] / 'npy' / path.parent.name / f'{path.stem}.npy').astype(np.float32)
        results |= {'img': image, 'img_shape': image.shape[:2], 'ori_shape': image.shape[:2]}
        return results


@TRANSFORMS.register_module()
class LoadBefore:
    """Put the picture of the same place before it changed behind the channels of the picture after."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        before = np.asarray(Image.open(results['img_path'].replace('/img/', '/img2/')))
        results['img'] = np.concatenate([results['img'], before], 2)
        return results


@MODELS.register_module()
class TwoTasks(BaseModel):
    """A classifier whose second head only the loss and predictions run."""

    def __init__(self, backbone: dict, head: dict, side: int, data_preprocessor: dict | None = None) -> None:
        super().__init__(data_preprocessor)
        self.backbone, self.head = MODELS.build(backbone), MODELS.build(head)
        self.side = nn.Sequential(nn.Linear(head['in_channels'], side), nn.ReLU(), nn.Linear(side, 2))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        features = tuple(f.mean((2, 3)) for f in self.backbone(inputs))
        if mode == 'tensor':
            return self.head(features)
        if mode == 'predict':
            for sample, score in zip(data_samples, self.side(features[-1]), strict=True):
                sample.set_field(score, 'side')
            return self.head.predict(features, data_samples)
        sides = torch.cat([sample.gt_label for sample in data_samples]) % 2
        return {**self.head.loss(features, data_samples), 'loss_side': F.cross_entropy(self.side(features[-1]), sides)}


def register_segmentors() -> None:
    """Register the segmentors; without mmseg there are none."""
    from mmseg.models.segmentors import EncoderDecoder
    from mmseg.registry import MODELS as SEGMENTORS

    @SEGMENTORS.register_module(force=True)
    class SiameseDecoder(EncoderDecoder):
        """One backbone for both pictures, whose difference is decoded."""

        def extract_feat(self, inputs: Tensor) -> list[Tensor]:
            after, before = self.backbone(inputs[:, :3]), self.backbone(inputs[:, 3:])
            return [torch.abs(a - b) for a, b in zip(after, before, strict=True)]

    @SEGMENTORS.register_module(force=True)
    class SideHeads(EncoderDecoder):
        """Convolutions at the side of each level that only the loss runs."""

        def __init__(self, side_channels: list[int], **options: Any) -> None:
            super().__init__(**options)
            self.sides = nn.ModuleList(nn.Conv2d(c, self.num_classes, 1) for c in side_channels)

        def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
            features = self.extract_feat(inputs)
            losses = self._decode_head_forward_train(features, data_samples)
            truth = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1)
            for level, (side, feature) in enumerate(zip(self.sides, features, strict=True)):
                logits = F.interpolate(side(feature), truth.shape[1:], mode='bilinear')
                losses[f'side{level}.loss'] = F.cross_entropy(logits, truth, ignore_index=255)
            return losses


@DATASETS.register_module()
class PlainTensors(Dataset):
    """Pictures and labels as plain tensors, as torch's own data sets have them."""

    def __init__(self, data_root: str, split: str) -> None:
        lines = [line.split() for line in (Path(data_root) / f'{split}.txt').read_text().splitlines()]
        self.items = [(Path(data_root) / 'img' / split / name, int(label)) for name, label in lines]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255, label


@MODELS.register_module()
class TutorialNet(BaseModel):
    """MMEngine's first example: no default of any argument, and no mode 'tensor'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32)
        self.second, self.fc = nn.Conv2d(32, 64, 3, 2), nn.Linear(64, 4)

    def forward(self, imgs: Tensor, labels: Tensor, mode: str) -> Any:
        x = self.norm(self.first(imgs)).relu()
        x = self.fc(self.second(x).relu().mean((2, 3)))
        if mode == 'loss':
            return {'loss': F.cross_entropy(x, labels)}
        return (x, labels) if mode == 'predict' else None


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneAndHead:
    """An optimizer for the backbone and one for what follows it."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.optimizers = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        parts: dict[str, list[nn.Parameter]] = {'backbone': [], 'head': []}
        for name, parameter in model.named_parameters():
            parts['backbone' if 'backbone' in name else 'head'].append(parameter)
        made = {n: OPTIMIZERS.build({**self.optimizers[n], 'params': params}) for n, params in parts.items()}
        return OptimWrapperDict(**{name: OptimWrapper(optimizer) for name, optimizer in made.items()})


@METRICS.register_module()
class RightShare(BaseMetric):
    """The share of right answers in percent, and the class that is missed most: a string."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        scores, truth = data_samples
        self.results += [(int(s.argmax()), int(t)) for s, t in zip(scores, truth, strict=True)]

    def compute_metrics(self, results: list) -> dict[str, Any]:
        missed = [truth for given, truth in results if given != truth]
        worst = f'c{max(set(missed), key=missed.count)}' if missed else None
        return {'right': 100 * (1 - len(missed) / len(results)), 'worst_class': worst}


if find_spec('mmseg') is not None:
    register_segmentors()
