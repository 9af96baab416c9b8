"""Compare masked and slimmed two-stage detectors with mmcv's own nms and roi_align, compiled for the installed torch.

mmcv has wheels with compiled operators for few versions of torch, and its setup does not compile all of them against
the newest. The sources of these two are in each wheel, and a compiler of C++20 takes them. The second stage gets fixed
boxes in one comparison, and those of the first stage in the other. Needs a compiler and `ninja`; a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.cpp_extension import load

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NAME = 'mmcv._ext'
BINDINGS = """
#include <torch/extension.h>
#include "pytorch_cpp_helper.hpp"
using namespace at;
Tensor nms(Tensor, Tensor, float, int);
void roi_align_forward(Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, int, int, bool);
void roi_align_backward(Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, int, int, bool);
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using py::arg;
  m.def("nms", &nms, "", arg("boxes"), arg("scores"), arg("iou_threshold"), arg("offset"));
  m.def("roi_align_forward", &roi_align_forward, "", arg("input"), arg("rois"), arg("output"), arg("argmax_y"),
        arg("argmax_x"), arg("aligned_height"), arg("aligned_width"), arg("spatial_scale"), arg("sampling_ratio"),
        arg("pool_mode"), arg("aligned"));
  m.def("roi_align_backward", &roi_align_backward, "", arg("grad_output"), arg("rois"), arg("argmax_y"),
        arg("argmax_x"), arg("grad_input"), arg("aligned_height"), arg("aligned_width"), arg("spatial_scale"),
        arg("sampling_ratio"), arg("pool_mode"), arg("aligned"));
}
"""


class Compiled(ModuleType):
    """`mmcv._ext` of the operators that were compiled; it counts their calls, and raises where another is called."""

    def __init__(self, part: ModuleType) -> None:
        super().__init__(NAME)
        self.__spec__ = ModuleSpec(NAME, None)
        self.part = part
        self.calls = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)

        def called(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return getattr(self.part, name)(*args, **options)

        return called


def compiled(folder: Path) -> Compiled:
    """Compile mmcv's sources of two operators into a folder, and let them stand for `mmcv._ext`."""
    found = importlib.util.find_spec('mmcv')
    assert found is not None and found.origin is not None
    sources = Path(found.origin).parent / 'ops' / 'csrc'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'bindings.cpp').write_text(BINDINGS)
    files = [folder / 'bindings.cpp', *(sources / 'pytorch' / f'{name}.cpp' for name in ('nms', 'roi_align'))]
    for name in ('nms', 'roi_align'):  # their objects may not have the names of those above
        files.append(shutil.copy(sources / 'pytorch' / 'cpu' / f'{name}.cpp', folder / f'cpu_{name}.cpp'))
    flags = ['-std=c++20', '-O2']
    include = [str(sources / 'common'), str(sources / 'pytorch')]
    part = load('mmcv_part', list(map(str, files)), flags, extra_include_paths=include, build_directory=str(folder))
    sys.modules[NAME] = module = Compiled(part)
    return module


@contextmanager
def own_proposals(model: nn.Module) -> Iterator[list[Any]]:
    """Stand for `fixed_proposals`: the second stage gets the boxes of the first, whose maps are outputs too."""
    maps: list[Any] = []
    handle = model.get_submodule('rpn_head').register_forward_hook(lambda _m, _i, out: maps.append(out))
    try:
        yield maps
    finally:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--only', action='append', help='a family of mmdet; repeatable')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--proposals', type=int, default=1000)
    parser.add_argument('--folder', type=Path, default=ROOT / 'work_dirs' / 'compiled_operators')
    args = parser.parse_args()
    torch.set_num_threads(1)
    operators = compiled(args.folder)

    # What stands in for mmcv's operators looks for them when it is imported.
    from benchmarks import zoo_mmdet
    from benchmarks.zoo_family import build
    from mmcpd.comb import comb
    from mmcpd.engine import passes
    from mmcpd.engine.operators import followed
    from mmcpd.slim.compare import compare
    from mmcpd.slim.trial import in_double, random_keep

    zoo_mmdet.PROPOSALS = args.proposals
    families = {family.name: family for family in zoo_mmdet.DETECTORS}
    boxes = {'fixed': passes.fixed_proposals, 'its own': own_proposals}
    runs: dict[str, Any] = {'compiled': nullcontext, 'torchvision': followed}
    print('detector, seed: boxes, operators: float32, float64')
    for name in args.only or ['faster_rcnn', 'cascade_rcnn']:
        for seed in range(args.seeds):
            model, inputs = build(families[name], seed)
            found = comb(model, inputs)
            keep = random_keep(found, 0.5, seed, awkward=True)
            twin, example = in_double(model, found.example)
            for which, how in boxes.items():
                for kind, context in runs.items():
                    operators.calls.clear()
                    with (
                        mock.patch.object(passes, 'fixed_proposals', how),
                        mock.patch.object(zoo_mmdet, 'followed', context),
                    ):
                        gaps = [f'{compare(model, found, keep):.0e}']
                        try:
                            gaps.append(f'{compare(twin, replace(found, example=example), keep):.0e}')
                        except RuntimeError as error:  # mmcv's nms has scores in float32 beside boxes in float64
                            gaps.append(f'not run: {error}')
                    assert bool(operators.calls) == (kind == 'compiled'), operators.calls
                    print(f'{name}, {seed}: {which}, {kind}: {", ".join(gaps)}', flush=True)


if __name__ == '__main__':
    main()
