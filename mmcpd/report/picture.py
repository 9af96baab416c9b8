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
    rows = [_row(number, layer, drawn, wide, widest) for number, layer in enumerate(layers)]
    more = len(placed) - len(drawn)
    said = f'<p class="soft">{more} more groups that layers share have no lane here.</p>' if more else ''
    return f'<ol class="layers" style="--lanes: {wide}px">{"".join(rows)}</ol>{said}'


def _row(number: int, layer: Layer, drawn: Sequence[Lane], wide: int, widest: int) -> str:
    here = [lane for lane in drawn if lane.first <= number <= lane.last]
    marks = ''.join(_marks(lane, number) for lane in here)
    through = ', '.join(lane.stream.group for lane in here)
    words = escape(f'shared with: {through}' if through else 'no shared group', quote=True)
    outline = 100 * (layer.dense / widest) ** 0.5
    kept = outline * layer.kept / layer.dense
    return (
        f'<li><svg class="lanes" viewBox="0 0 {max(wide, 1)} 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{words}">{marks}</svg><code>{escape(layer.path)}</code>'
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="kept" width="{kept:.2f}" height="10"/>'
        f'<rect class="dense" x=".2" y=".2" width="{outline - 0.4:.2f}" height="9.6"/></svg>'
        f'<span>{layer.kept} of {layer.dense}</span></li>'
    )


def _marks(lane: Lane, number: int) -> str:
    """Draw a lane in the row of a layer: a square where it writes, a dash where it reads, a line where it passes."""
    x, colour = lane.place * STEP, f'style="fill: var(--c{lane.place % COLOURS})"'
    top, bottom = (5 if number == lane.first else 0), (5 if number == lane.last else 10)
    line = f'<rect {colour} x="{x + 3}" y="{top}" width="2" height="{bottom - top}"/>'
    if number in lane.stream.writers:
        return f'{line}<rect {colour} x="{x}" y="2.5" width="8" height="5"/>'
    if number in lane.stream.readers:
        return f'{line}<rect {colour} x="{x}" y="4.5" width="8" height="1"/>'
    return line
