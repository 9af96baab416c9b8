"""Draw validation pictures, the classes of their pixels, and boxes, small enough to stand inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmcpd.engine.class_scores import Boxes
from mmcpd.report.data import View

LONGEST, SHORTEST = 320, 160  # pixels of a drawing's longer side
SURE = 0.3  # boxes below are not drawn
VEIL = 0.6  # how much of a pixel is its class's colour


def as_picture(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return what a loader gives, `(C, h, w)`, as an RGB picture `(H, W, 3)` uint8; three channels are blue first.

    What is no uint8 is stretched from its least value to its largest; of other numbers of channels the mean is shown.

    Example:
        >>> as_picture(np.zeros((3, 4, 6), np.uint8), (8, 12)).shape
        (8, 12, 3)
    """
    picture = values[::-1] if len(values) == 3 else values.mean(0, keepdims=True).repeat(3, 0)
    if values.dtype != np.uint8:
        low, high = float(picture.min()), float(picture.max())
        picture = (picture - low) * (255 / (high - low or 1.0))
    height, width = size
    return np.asarray(Image.fromarray(picture.transpose(1, 2, 0).astype(np.uint8)).resize((width, height)))


def colours(classes: int) -> np.ndarray:
    """Return a colour for each class, `(classes, 3)` uint8, neighbours far apart.

    Example:
        >>> len(np.unique(colours(100), axis=0))
        100
    """
    hues = (np.arange(classes) * 0.618034) % 1.0
    rings = np.array([(230, 200), (170, 255), (255, 140)])[np.arange(classes) % 3]
    hsv = np.stack([hues * 255, rings[:, 0], rings[:, 1]], 1).round().astype(np.uint8)
    return np.asarray(Image.fromarray(hsv[None], 'HSV').convert('RGB'))[0]


def class_name(names: Sequence[str], label: int) -> str:
    """Return the name of a class, its number where a model has more classes than the data set has names.

    Example:
        >>> class_name(['cat', 'dog'], 1), class_name(['cat', 'dog'], 7)
        ('dog', '7')
    """
    return names[label] if 0 <= label < len(names) else str(label)


def hexadecimal(palette: np.ndarray) -> list[str]:
    """Return colours `(n, 3)` as a page names them.

    Example:
        >>> hexadecimal(np.array([[255, 0, 10]]))
        ['#ff000a']
    """
    return [f'#{red:02x}{green:02x}{blue:02x}' for red, green, blue in palette.tolist()]


def veiled(picture: np.ndarray, pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Lay the colours of classes `(H, W)` over a picture `(H, W, 3)`; labels beyond the palette stay bare.

    Example:
        >>> veiled(np.zeros((1, 2, 3), np.uint8), np.array([[0, 255]]), np.array([[100, 0, 0]])).tolist()
        [[[60, 0, 0], [0, 0, 0]]]
    """
    valid = (pixels >= 0) & (pixels < len(palette))
    out = picture.astype(float)
    out[valid] = (1 - VEIL) * out[valid] + VEIL * palette[pixels[valid].astype(int)]
    return out.round().astype(np.uint8)


def boxed(picture: np.ndarray, boxes: Boxes, names: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """Draw the boxes that are sure enough onto a picture `(H, W, 3)`, their classes on plates of the same colour.

    Example:
        >>> boxes = Boxes(np.array([[1.0, 1, 6, 6]]), np.array([0]), np.array([0.9]))
        >>> boxed(np.zeros((8, 8, 3), np.uint8), boxes, ['cat'], np.array([[200, 0, 0]]))[1, 1].tolist()
        [200, 0, 0]
    """
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    plates = []
    for (left, top, right, bottom), label, score in zip(boxes.corners, boxes.labels, boxes.scores, strict=True):
        if score >= SURE and right >= left and bottom >= top:
            colour = tuple(int(value) for value in palette[int(label) % len(palette)])
            draw.rectangle((left, top, right, bottom), outline=colour, width=max(1, max(image.size) // 160))
            plates.append((left, top, class_name(names, int(label)), colour))
    for left, top, name, colour in plates:  # above all boxes
        _, _, width, height = draw.textbbox((0, 0), name)
        x = max(0, min(left, image.width - width - 5))
        y = top - height - 3 if top > height + 3 else top  # over the box, where there is room
        draw.rectangle((x, y, x + width + 4, y + height + 2), fill=colour)
        draw.text((x + 2, y), name, fill=readable_on(colour))
    return np.asarray(image)


def readable_on(colour: Sequence[int]) -> str:
    """Return black or white, whichever has more contrast to a colour: at least 4.5, by WCAG 2's relative luminance.

    Example:
        >>> readable_on((255, 255, 0)), readable_on((0, 0, 160))
        ('black', 'white')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 'black' if luminance > 0.179 else 'white'  # where both have a contrast of 4.6


def enlarged(picture: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a picture `(H, W, 3)` at the size that is shown, and how much larger it became.

    Example:
        >>> enlarged(np.zeros((32, 32, 3), np.uint8))[1]
        5.0
    """
    height, width = picture.shape[:2]
    scale = min(1.0, LONGEST / max(height, width)) if max(height, width) > SHORTEST else SHORTEST / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)), scale


def view(label: str, picture: np.ndarray) -> View:
    """Return a picture `(H, W, 3)` as a JPEG inside an address.

    Example:
        >>> view('slim', np.zeros((8, 8, 3), np.uint8)).source[:22]
        'data:image/jpeg;base64'
    """
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'JPEG', quality=85)
    source = f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'
    return View(label, source, picture.shape[1], picture.shape[0])
