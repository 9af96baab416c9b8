"""Check the versions of what mmcpd stands on, importing none of it at first, and hold what Python 3.10 lacks.

The table is the one place for versions: `setup.py` runs this file for its extras, so nothing outside the
standard library may be imported here.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NamedTuple, TypeVar

_T = TypeVar('_T')


class Requirement(NamedTuple):
    """Name one package that mmcpd needs, by every distribution that provides it."""

    module: str  # what is imported
    distributions: tuple[str, ...]  # what pip installs; any one will do, the first is what we advise
    minimum: str  # the oldest version that works
    checked: str | None = None  # the version that the whole stack was checked with, if we pin it


REQUIREMENTS: dict[str, tuple[Requirement, ...]] = {
    'pure': (
        Requirement('torch', ('torch',), '2.4'),
        Requirement('numpy', ('numpy',), '1.24'),
        Requirement('scipy', ('scipy',), '1.10'),
        # Byte code of Python 3.10 knows no columns: executing finds the node of an instruction.
        *([Requirement('executing', ('executing',), '2.0')] if sys.version_info < (3, 11) else []),
    ),
    # OneDL's packages are the maintained continuation of OpenMMLab's, under the same import names.
    'openmmlab': (
        Requirement('mmengine', ('onedl-mmengine', 'mmengine'), '0.10.0', '0.10.12'),
        Requirement('mmcv', ('onedl-mmcv', 'mmcv', 'mmcv-lite'), '2.0.0', '2.3.6'),
        Requirement('mmpretrain', ('onedl-mmpretrain', 'mmpretrain'), '1.0.1', '1.3.6'),
        Requirement('mmseg', ('onedl-mmsegmentation', 'mmsegmentation'), '1.2.2', '1.4.2'),
    ),
    'detection': (
        Requirement('mmdet', ('onedl-mmdetection', 'mmdet'), '3.0.0', '3.5.1'),
        Requirement('torchvision', ('torchvision',), '0.19'),  # nms and pooling of regions, where mmcv has none
    ),
    'deploy': (
        Requirement('onnx', ('onnx',), '1.16'),
        Requirement('onnxruntime', ('onnxruntime', 'onnxruntime-gpu'), '1.17'),
        Requirement('onnxscript', ('onnxscript',), '0.1'),
    ),
    'demo': (Requirement('sklearn', ('scikit-learn',), '1.3'), Requirement('matplotlib', ('matplotlib',), '3.7')),
}
# Checked when they are there; who prunes models brings the package that the models are of.
OPTIONAL = ('mmpretrain', 'mmseg', 'mmdet', 'torchvision')


def release(text: str) -> tuple[int, ...]:
    """Return the numbers at the front of a version, without trailing zeros.

    Example:
        >>> release('2.14.1+cu130'), release('0.10.8rc1'), release('2.0')
        ((2, 14, 1), (0, 10, 8), (2,))
    """
    match = re.match(r'\d+(?:\.\d+)*', text)
    numbers = [int(part) for part in match.group().split('.')] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def installed(distributions: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the name and version of the newest installed distribution among `distributions`, or None."""
    found = []
    for name in distributions:
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return max(found, key=lambda pair: release(pair[1]), default=None)


def advised(part: str) -> dict[str, str]:
    """Return the distribution to install for each module of a part: of the family that is there, OneDL's else.

    Two families side by side would overwrite each other's modules.
    """
    names = {requirement.module: requirement.distributions for requirement in REQUIREMENTS[part]}
    found = [found[0] for distributions in names.values() if (found := installed(distributions)) is not None]
    original = bool(found) and not any(name.startswith('onedl-') for name in found)
    return {
        module: next((name for name in distributions if original and not name.startswith('onedl-')), distributions[0])
        for module, distributions in names.items()
    }


def pip_requirement(requirement: Requirement, distribution: str | None = None) -> str:
    """Return what to ask pip for: the checked pin of what we advise, else the minimum of what is there."""
    name = distribution or requirement.distributions[0]
    if requirement.checked and name == requirement.distributions[0]:
        return f'{name}=={requirement.checked}'
    return f'{name}>={requirement.minimum}'


def require(part: str) -> None:
    """Check the packages of one part of mmcpd, a key of `REQUIREMENTS`.

    Raises:
        ImportError: A package is missing or too old; the message names each one, the version found, the
            version needed, and one pip command that mends them all.

    Example:
        >>> require('pure')
    """
    faults, mend = [], []
    for requirement in REQUIREMENTS[part]:
        found = installed(requirement.distributions)
        if found is None:
            if requirement.module not in OPTIONAL:
                name = advised(part)[requirement.module]
                faults.append(f'{name} is missing (needs >= {requirement.minimum})')
                mend.append(pip_requirement(requirement, name))
        elif release(found[1]) < release(requirement.minimum):
            faults.append(f'{found[0]} {found[1]} is too old (needs >= {requirement.minimum})')
            mend.append(pip_requirement(requirement, found[0]))
    if faults:
        command = ' '.join(f"'{text}'" for text in mend)
        raise ImportError(f'mmcpd: {"; ".join(faults)}. To mend it: pip install {command}')


@cache
def imported(module: str) -> ModuleType | None:
    """Import a module of an optional package, or return None: absent, or broken, which one log line says.

    MMSegmentation 1.0 cannot be imported beside `mmcv-lite`, for it wants mmcv's compiled operators. Who prunes
    classifiers needs none of it.

    Example:
        >>> imported('json').__name__, imported('no_such_package.models')
        ('json', None)
    """
    package = module.partition('.')[0]
    try:
        return importlib.import_module(module)
    except (ImportError, AssertionError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == package):
            reason = ' '.join(str(error).split()) or type(error).__name__
            logging.getLogger('mmcpd').warning(
                f'{package} is installed, but cannot be imported ({reason}); models that need it cannot be built'
            )
        return None


def leave_out_multimodal() -> None:
    """Let MMPretrain be imported beside transformers 5, which lacks what its multimodal models are made of.

    It asks for 4.28 or newer, and beside 5 its import ends in an error, whichever model is wanted. Its own switch
    leaves them out; a config that names one is told so.
    """
    transformers = installed(('transformers',))
    if transformers is None or release(transformers[1]) < (5,) or 'mmpretrain.models' in sys.modules:
        return
    with suppress(ImportError, KeyError):
        switches = vars(importlib.import_module('mmpretrain.utils.dependency'))
        if switches['WITH_MULTIMODAL']:
            switches['WITH_MULTIMODAL'] = False
            logging.getLogger('mmcpd').warning(
                f'transformers {transformers[1]} is too new for the multimodal models of mmpretrain: they are left out'
            )


def extras() -> dict[str, list[str]]:
    """Return pip's extras, one for each part that is not a hard dependency."""
    return {part: [pip_requirement(each) for each in needed] for part, needed in REQUIREMENTS.items() if part != 'pure'}


class StrEnum(str, Enum):
    """Name a few texts, which print as themselves: `enum.StrEnum` of Python 3.11.

    Example:
        >>> StrEnum('Colour', {'RED': 'red'}).RED == 'red', f'{StrEnum("Colour", {"RED": "red"}).RED}'
        (True, 'red')
    """

    __str__ = str.__str__


def call(function: Callable[..., _T], /, *inputs: object) -> _T:
    """Call a function or a model: `operator.call` of Python 3.11.

    Example:
        >>> call(max, 1, 3)
        3
    """
    return function(*inputs)
