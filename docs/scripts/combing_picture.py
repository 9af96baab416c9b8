"""Draw what combing does to a residual block: `python docs/scripts/combing_picture.py`, into docs/images/combing.svg.

Widths and groups are not drawn by hand: the block is built, combed and slimmed, and the picture shows what was found.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling, Keep
from mmcpd.slim import slim

IMAGES = Path(__file__).resolve().parents[1] / 'images'
LAYERS = ('stem', 'conv1', 'conv2', 'fc')
COLOURS = ('#0072B2', '#D55E00')  # of the groups, in their order
BAR, GAP, ROW, TOP, LEFT, RIGHT = 16, 4, 72, 64, 130, 420


class Block(nn.Module):
    """A stem, a residual block of two convolutions, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.conv2(self.conv1(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


def removed(coupling: Coupling) -> Keep:
    """Return a keep without some units of each group."""
    keep = coupling.keep()
    for index, group in enumerate(coupling.groups):
        keep[group.name][[1, 4] if index == 0 else [0, 3, 5]] = False
    return keep


def draw() -> str:
    """Return the SVG: rows of channels for each layer's output, dense and slim, coloured by group."""
    torch.manual_seed(0)
    model, images = Block().eval(), torch.rand(2, 3, 8, 8)
    coupling = comb(model, images)
    keep = removed(coupling)
    small = slim(model, coupling, keep)
    owner = {
        member.tensor.rpartition('.')[0]: (index, group.name)
        for index, group in enumerate(coupling.groups)
        for member in group.members
        if member.dim == 0
    }
    parts = [text(LEFT, 28, 'what combing finds'), text(RIGHT, 28, 'after slimming')]
    for row, layer in enumerate(LAYERS):
        y = TOP + row * ROW
        index, group = owner.get(layer, (None, ''))
        rows = model.get_submodule(layer).weight.shape[0]
        kept = keep[group] if group else torch.ones(rows, dtype=torch.bool)
        colour = '#767676' if index is None else COLOURS[index]
        parts += [text(16, y + 20, layer), *bars(LEFT, y, colour, kept.tolist(), dense=True)]
        assert int(kept.sum()) == small.get_submodule(layer).weight.shape[0]
        parts += bars(RIGHT, y, colour, [True] * int(kept.sum()), dense=False)
        note = 'the classes: frozen' if index is None else f'group {index + 1}'
        parts += [
            text(LEFT, y + 44, f'{rows} channels, {note}', small=True),
            text(RIGHT, y + 44, str(int(kept.sum())), small=True),
        ]
    left, top, bottom = LEFT + 9 * (BAR + GAP), TOP + 12, TOP + 2 * ROW + 12
    path = f'M{left - 50} {top}H{left + 50}V{bottom}H{left - 50}'
    parts.append(f'<path d="{path}" fill="none" stroke="#666" stroke-dasharray="4 3"/>')
    parts.append(text(left - 6, (top + bottom) // 2, 'the sum', small=True))
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 370" font-family="sans-serif" font-size="15" '
        'role="img" aria-label="A residual block, its channels in two groups, and the block after slimming">'
    )
    return '\n'.join([head, '<rect width="620" height="370" fill="white"/>', *parts, '</svg>']) + '\n'


def bars(x: int, y: int, colour: str, kept: list[bool], dense: bool) -> list[str]:
    """Return one rectangle for each channel, and hollow ones for those that go."""
    return [
        f'<rect x="{x + i * (BAR + GAP)}" y="{y}" width="{BAR}" height="28" fill="{colour if stays else "white"}" '
        f'stroke="{colour}"{"" if stays or not dense else " stroke-dasharray=" + chr(34) + "3 2" + chr(34)}/>'
        for i, stays in enumerate(kept)
    ]


def text(x: int, y: int, words: str, small: bool = False) -> str:
    """Return a line of text."""
    return (
        f'<text x="{x}" y="{y}" fill="#222"{" font-size=" + chr(34) + "13" + chr(34) if small else ""}>{words}</text>'
    )


if __name__ == '__main__':
    (IMAGES / 'combing.svg').write_text(draw(), encoding='utf-8')
