"""Draw a model as its layers in order: dense width as an outline, kept width filled, shared groups as lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mmcpd.report.data import Layer, Stream

STEP, MOST = 9, 12  # pixels from lane to lane, and how many lanes there can be
COLOURS = 4


@dataclass(frozen=True)
class Lane:
    """Where a stream is drawn: from the first to the last of its layers."""

    stream: Stream
    place: int
    first: int
    last: int


def lanes(streams: Sequence[Stream]) -> list[Lane]:
    """Give each stream a lane of its own from its first layer to its last, those that come first to the left.

    Example:
        >>> one, two = Stream('a', 8, 4, [0, 2], [3]), Stream('b', 8, 4, [3, 5], [])
        >>> [lane.place for lane in lanes([one, two, Stream('c', 8, 8, [4, 6], [7])])]
        [0, 1, 0]
    """
    spans = sorted((min(s.writers), max([*s.writers, *s.readers]), number) for number, s in enumerate(streams))
    free: list[int] = []  # the last layer of what is in each lane
    found = []
    for first, last, number in spans:
        place = next((place for place, end in enumerate(free) if end < first), len(free))
        free[place : place + 1] = [last]
        found.append(Lane(streams[number], place, first, last))
    return found


def model_picture(layers: Sequence[Layer], streams: Sequence[Stream]) -> str:
    """Return a picture of a model as a list of HTML whose rows hold SVG, so that it breaks across pages.

    Example:
        >>> layer = Layer('conv1', 8, 4, 224, 112, 'conv1', '')
        >>> picture = model_picture([layer], [])
        >>> 'conv1' in picture, '4 of 8' in picture
        (True, True)
    """
    placed = lanes(streams)
    drawn = [lane for lane in placed if lane.place < MOST]
    wide = STEP * (1 + max((lane.place for lane in drawn), default=-1))
    widest = max((layer.dense for layer in layers), default=1)
    rows, part = [], ''
    for number, layer in enumerate(layers):
        before, (part, _) = part, parted(layer.path)
        rows += [_heading(number, part, drawn, wide)] if part != before else []
        rows.append(_row(number, layer, drawn, wide, widest))
    more = len(placed) - len(drawn)
    rest = f'<p class="soft">{more} more groups that layers share have no lane here.</p>' if more else ''
    return f'<ol class="layers" style="--lanes: {wide}px">{"".join(rows)}</ol>{rest}'


def parted(path: str) -> tuple[str, str]:
    """Return a layer's path in two: the part of the model that it stands under, and its name there.

    Example:
        >>> parted('backbone.layer1.0.conv1'), parted('head.fc'), parted('conv1')
        (('backbone.layer1', '0.conv1'), ('head', 'fc'), ('', 'conv1'))
    """
    words = path.split('.')
    count = min(2, len(words) - 1)
    return '.'.join(words[:count]), '.'.join(words[count:])


def breakable(path: str) -> str:
    """Return a path as HTML that breaks behind its dots and underscores.

    Example:
        >>> breakable('attn.to_q')
        'attn.<wbr>to_<wbr>q'
    """
    return escape(path).replace('.', '.<wbr>').replace('_', '_<wbr>')


def _heading(number: int, part: str, drawn: Sequence[Lane], wide: int) -> str:
    through = [lane for lane in drawn if lane.first < number <= lane.last]
    marks = ''.join(_rect(lane, lane.place * STEP + 3, 0, 2, 10) for lane in through)
    return f'<li class="part">{_lanes_svg(marks, wide, "")}<code>{breakable(part)}</code></li>' if part else ''


def _lanes_svg(marks: str, wide: int, words: str) -> str:
    named = f'role="img" aria-label="{escape(words, quote=True)}"' if words else 'aria-hidden="true"'
    box = f'viewBox="0 0 {max(wide, 1)} 10" preserveAspectRatio="none"'
    return f'<svg class="lanes" {box} {named}>{marks}</svg>'


def _rect(lane: Lane, x: float, y: float, width: float, height: float) -> str:
    style = f'style="fill: var(--c{lane.place % COLOURS})"'
    return f'<rect {style} x="{x}" y="{y}" width="{width}" height="{height}"/>'


def _row(number: int, layer: Layer, drawn: Sequence[Lane], wide: int, widest: int) -> str:
    here = [lane for lane in drawn if lane.first <= number <= lane.last]
    marks = ''.join(_marks(lane, number) for lane in here)
    through = ', '.join(lane.stream.group for lane in here)
    words = f'shared with: {through}' if through else 'no shared group'
    outline = 100 * (layer.dense / widest) ** 0.5
    kept = outline * layer.kept / layer.dense
    return (
        f'<li>{_lanes_svg(marks, wide, words)}<code>{breakable(parted(layer.path)[1])}</code>'
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="kept" width="{kept:.2f}" height="10"/>'
        f'<rect class="dense" x=".2" y=".2" width="{outline - 0.4:.2f}" height="9.6"/></svg>'
        f'<span>{layer.kept} of {layer.dense}</span></li>'
    )


def _marks(lane: Lane, number: int) -> str:
    """Draw a lane in the row of a layer: a square where it writes, a dash where it reads, a line where it passes."""
    x = lane.place * STEP
    top, bottom = (5 if number == lane.first else 0), (5 if number == lane.last else 10)
    line = _rect(lane, x + 3, top, 2, bottom - top)
    if number in lane.stream.writers:
        return line + _rect(lane, x, 2.5, 8, 5)
    if number in lane.stream.readers:
        return line + _rect(lane, x, 4.5, 8, 1)
    return line
