"""CamVid in the accuracy tables: a segmentor that is trained once, then pruned with little or no training.

Pictures and dense training are those of `configs/cpd/camvid_mobilenetv2_prune.py`: the 1200 iterations with which that
config begins, at 180x240. `camvid` has its MobileNetV2, from ImageNet weights; `camvid_seaformer` a SeaFormer-T that
knows nothing before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from benchmarks.accuracy_tasks import CONFIGS, Batch, Task
from mmcpd.engine.build import build_dense
from mmcpd.random_state import seeded

ITERATIONS = 1200  # dense
EVALUATED_TOGETHER = 16
IGNORED = 255


@dataclass(frozen=True)
class CamVidTask(Task):
    """A segmentor of road scenes; held out are the validation pictures, tested on are the 233 test pictures."""

    name: str
    metric: ClassVar[str] = 'mIoU'
    classifier: ClassVar[str] = 'decode_head.conv_seg'
    data: Path
    weights: Path | None  # of MobileNetV2 on ImageNet; without, the model is a SeaFormer-T
    work_dir: Path
    shares: tuple[float, ...] = (0.75, 0.5)
    trained_share: float = 0.5
    budgets: tuple[int, ...] = (0,)
    tried: tuple[int, ...] = (80,)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    default_rate: float = 3e-4
    score_pictures: int = 300
    batch: int = 4

    def config(self) -> Config:
        """Return the shipped config without pruning: the dense model, its pictures, its first 1200 iterations."""
        cfg = Config.fromfile(CONFIGS / 'camvid_mobilenetv2_prune.py')
        cfg.model = cfg.model.student  # Config.update would merge the two
        cfg.default_hooks.pop('prune')
        if self.weights is None:
            cfg.model = seaformer(cfg.model)
        else:  # ImageNet weights that were trained with TensorFlow's padding
            cfg.model.backbone.conv_cfg = dict(type='Conv2dAdaptivePadding')
            cfg.model.backbone.init_cfg.checkpoint = str(self.weights)
        for name in ('train', 'val', 'test'):
            cfg[f'{name}_dataloader'].dataset.data_root = str(self.data)
            cfg[f'{name}_dataloader'].update(num_workers=0, persistent_workers=False)
        return cfg

    def dense(self) -> nn.Module:
        file = self.work_dir / f'{self.name}_dense.pth'
        if not file.is_file():
            train_dense(self.config(), self.work_dir / self.name, file)
        cfg = self.config()
        cfg.model.backbone.init_cfg = None
        model = build_dense(cfg)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()

    def example(self) -> Tensor:
        return self.plain(1, 0)[0].images

    def plain(self, count: int, seed: int) -> list[Batch]:
        cfg = self.config()
        scenes = dict(cfg.test_dataloader.dataset, data_prefix=cfg.train_dataloader.dataset.data_prefix)
        return self._batches(scenes, count, seed, EVALUATED_TOGETHER)

    def augmented(self, count: int, seed: int) -> list[Tensor]:
        scenes = self.config().train_dataloader.dataset
        return [batch.images for batch in self._batches(scenes, count, seed, EVALUATED_TOGETHER, training=True)]

    def stream(self, seed: int) -> Iterator[Batch]:
        scenes, epoch = self.config().train_dataloader.dataset, 0
        while True:
            batches = self._batches(scenes, 367, 1000 * seed + epoch, self.batch, training=True)
            yield from (batch for batch in batches if len(batch.labels) == self.batch)
            epoch += 1

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, held_out: bool = False) -> float:
        cfg = self.config()
        scenes = build_scenes((cfg.val_dataloader if held_out else cfg.test_dataloader).dataset)
        classes = len(scenes.metainfo['classes'])
        confusion = torch.zeros(classes**2, dtype=torch.int64)
        model.eval()
        for start in range(0, len(scenes), EVALUATED_TOGETHER):
            samples = [scenes[i] for i in range(start, min(start + EVALUATED_TOGETHER, len(scenes)))]
            for found in model.test_step(pseudo_collate(samples)):
                truth, seen = found.gt_sem_seg.data.flatten().long(), found.pred_sem_seg.data.flatten()
                valid = truth != IGNORED
                confusion += torch.bincount(classes * truth[valid] + seen[valid], minlength=classes**2)
        return mean_iou(confusion.view(classes, classes))

    def _batches(self, scenes: Any, count: int, seed: int, size: int, *, training: bool = False) -> list[Batch]:
        """Return random scenes in batches: normalised pictures (N, 3, H, W) and labels (N, H, W)."""
        found = build_scenes(scenes)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1000 + seed))[:count].tolist()
        preprocess = build_dense(self.config()).data_preprocessor
        batches = []
        with seeded(seed):
            for start in range(0, len(order), size):
                samples = [found[i] for i in order[start : start + size]]
                data = preprocess(pseudo_collate(samples), training)
                labels = [sample.gt_sem_seg.data.squeeze(0).long() for sample in data['data_samples']]
                batches.append(Batch(data['inputs'], torch.stack(labels)))
        return batches


def seaformer(other: ConfigDict) -> ConfigDict:
    """Return the SeaFormer-T of the embedded scenes, which starts from nothing, for the pictures of another model."""
    model = Config.fromfile(CONFIGS.parent / '_base_' / 'models' / 'seaformer_scenes.py').model
    model.data_preprocessor = other.data_preprocessor
    model.decode_head.num_classes = other.decode_head.num_classes
    return model


def build_scenes(config: Any) -> Any:
    with DefaultScope.overwrite_default_scope('mmseg'):
        return DATASETS.build(config)


def mean_iou(confusion: Tensor) -> float:
    """Return the mean IoU of a confusion matrix (true, predicted), percent, over classes that occur."""
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float(100 * (hit / union)[union > 0].mean())


def train_dense(cfg: Config, work_dir: Path, file: Path) -> None:
    """Train the dense model by its config, on from where a run was interrupted, and write its weights."""
    cfg.param_scheduler[1].update(periods=[ITERATIONS - 50], restart_weights=[1])
    cfg.train_cfg.update(max_iters=ITERATIONS, val_interval=ITERATIONS + 1)
    cfg.default_hooks.checkpoint.update(interval=100)
    cfg.update(work_dir=str(work_dir), resume=True, log_level='WARNING', experiment_name='camvid_dense')
    for name in ('val', 'test'):
        cfg.update({f'{name}_{part}': None for part in ('dataloader', 'cfg', 'evaluator')})
    runner = Runner.from_cfg(cfg)
    runner.train()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix('.part')
    torch.save(runner.model.state_dict(), part)
    part.replace(file)
