"""What the report of a run holds: plain values, so that `dataclasses.asdict` is its form in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A number of the dense model beside that of the slim one; None where it is not known.

    Attributes:
        name: of what, as `MACs`.
        unit: '' of a pure number.
        is_cost: whether less is better, and the share that remains is what matters; else the change is.
    """

    name: str
    unit: str
    dense: float | None
    slim: float | None
    is_cost: bool = True


@dataclass(frozen=True)
class Layer:
    """A layer's width, in channels that it gives out, and its parameters (elements), dense and slim.

    `group` is the coupling group of its channels, '' where none of them can go; `frozen` is why some cannot.
    """

    path: str
    dense: int
    kept: int
    dense_params: int
    slim_params: int
    group: str
    frozen: str


@dataclass(frozen=True)
class Stream:
    """A group whose units several layers give out, as those of a residual stream: its layers, by their numbers."""

    group: str
    units: int
    kept: int
    writers: Sequence[int]
    readers: Sequence[int]


@dataclass(frozen=True)
class Frozen:
    """How many rows of the model's tensors a reason keeps."""

    reason: str
    rows: int


@dataclass(frozen=True)
class Curve:
    """Values over the iterations of a training; `unit` is '' of a pure number."""

    name: str
    unit: str
    iterations: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class ClassScore:
    """A class, how often it is in the validated pictures, and its score of both models, in percent.

    `count` counts pictures, pixels or boxes; a score is None where the class is nowhere. `colour` is what the pictures
    draw it in, as `#rrggbb`, '' where they do not.
    """

    name: str
    count: int
    dense: float | None
    slim: float | None
    colour: str = ''


@dataclass(frozen=True)
class View:
    """One drawing of a picture: what it shows, and a PNG or JPEG as a `data:` address."""

    label: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """A validation picture as several views: itself, its labels, and what both models predict."""

    caption: str
    views: Sequence[View]


@dataclass(frozen=True)
class Predictions:
    """Both models on validation pictures; `measure` says what the classes' score is, `data` on what."""

    measure: str
    counted: str
    data: str
    classes: Sequence[ClassScore] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Setting:
    """A name and its value, in words."""

    name: str
    value: str


@dataclass(frozen=True)
class RunReport:
    """All that the page of a run shows; what the run has not is empty, and `missing` says how to get it.

    Attributes:
        title: the run's name.
        model, data: what was pruned, and on what it is validated, in words.
        stage: how far it was pruned, in words.
        quantities: dense against slim; costs first.
        metric: the name of the quantity that counts, '' where nothing was validated.
        layers, streams, frozen: the model's picture.
        costs, curves: of the training, costs in percent of the dense model; `events` are iterations at which units go.
        predictions: None where there are none.
        settings, versions: in words.
        command: what repeats the run.
        config: its text.
        load: Python that loads the slim model.
        license: of the model, in words.
        missing: sentences.
    """

    title: str
    model: str
    data: str
    stage: str
    quantities: Sequence[Quantity]
    metric: str = ''
    layers: Sequence[Layer] = ()
    streams: Sequence[Stream] = ()
    frozen: Sequence[Frozen] = ()
    costs: Sequence[Curve] = ()
    curves: Sequence[Curve] = ()
    events: Sequence[int] = ()
    predictions: Predictions | None = None
    settings: Sequence[Setting] = ()
    versions: Sequence[Setting] = ()
    command: str = ''
    config: str = ''
    load: str = ''
    license: str = ''
    missing: Sequence[str] = ()
