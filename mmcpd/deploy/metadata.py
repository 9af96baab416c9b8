"""What an ONNX file says of itself: values of JSON by key, in its `metadata_props`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import onnx

from mmcpd.version import __version__

VERSION = 'mmcpd'  # the key of mmcpd's version
BOXES = 'boxes, scores, labels'  # the output of a file that finds objects


def write_metadata(path: str | os.PathLike, metadata: Mapping[str, object]) -> None:
    """Let an ONNX file say these values of JSON, by key, and mmcpd's version, and nothing else, in place."""
    model = onnx.load(path)
    texts = {key: json.dumps(value) for key, value in {VERSION: __version__, **metadata}.items()}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Return what an ONNX file of mmcpd says of itself, by key.

    Raises:
        ValueError: mmcpd did not write it.

    Example:
        >>> from mmcpd.deploy import export_onnx
        >>> path = export_onnx(model, images, 'model.onnx', metadata={'classes': ['cat', 'dog']})
        >>> read_metadata(path)['classes']
        ['cat', 'dog']
    """
    texts = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    if VERSION not in texts:
        raise ValueError(f'{os.fspath(path)} says nothing of its classes and pictures: mmcpd did not write it')
    return {key: json.loads(text) for key, text in texts.items()}
