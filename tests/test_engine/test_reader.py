"""No file runs code, however it is handed over; MMEngine's own checkpoints are read all the same."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from torch import nn

from mmcpd.engine import reader
from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.errors import SlimError


class Payload:
    """What an attacker writes: reading it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


class Reached:
    """The same by attributes: `getattr` of what is allowed, step by step."""

    def __init__(self, start: object, name: str) -> None:
        self.start, self.name = start, name

    def __reduce__(self) -> tuple[Any, tuple[object, str]]:
        return getattr, (self.start, self.name)


@pytest.fixture(autouse=True)
def untrusting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, '_trusted', False)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / 'ran'


def content(ran: Path) -> dict[str, Any]:
    return {'state_dict': nn.Linear(3, 2).state_dict(), 'meta': {'author': Payload(ran)}}


@pytest.mark.parametrize('zipped', (True, False))
def test_a_payload_does_not_run_and_is_named(tmp_path: Path, ran: Path, zipped: bool) -> None:
    path = tmp_path / 'a.pth'
    torch.save(content(ran), path, _use_new_zipfile_serialization=zipped)
    for read in (reader.load, read_checkpoint, CheckpointLoader.load_checkpoint):
        with pytest.raises(SlimError, match=r'a\.pth is refused: to read it is to run posix\.mkdir') as caught:
            read(str(path))
        assert '--trust-checkpoint' in str(caught.value) and '\n' not in str(caught.value)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), 'the payload is none'


def test_mmengine_s_own_fallback_would_have_run_it(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, '_instead_of_torch', lambda: io.BytesIO())  # any context
    torch.save(content(ran), tmp_path / 'a.pth')
    CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), logger='silent')
    assert ran.exists()


def test_of_attributes_only_the_statistics_of_logs_are_reached(tmp_path: Path) -> None:
    for start, name in ((HistoryBuffer, '__init__'), (HistoryBuffer, 'register_statistics'), (np.ndarray, 'tofile')):
        torch.save({'state_dict': {}, 'x': Reached(start, name)}, tmp_path / 'a.pth')
        with pytest.raises(SlimError, match=f'to run builtins.getattr of {name}'):
            reader.load(tmp_path / 'a.pth')
    torch.save({'x': Reached(HistoryBuffer, 'mean')}, tmp_path / 'a.pth')
    assert reader.load(tmp_path / 'a.pth') == {'x': HistoryBuffer.mean}


def test_what_is_trusted_runs_but_never_a_slim_file(tmp_path: Path, ran: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save(content(ran), path)
    reader.trust()
    with pytest.raises(SlimError, match=r'holds more than weights \(posix\.mkdir\)'):
        reader.load(path, plain=True)
    assert not ran.exists()
    assert read_checkpoint(path).keys() == {'state_dict', 'meta'}
    assert ran.exists()


def test_a_training_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Logs, arrays and numbers of NumPy, an optimizer's state, tied tensors, and an open file."""
    hub = MessageHub('test_a_training_checkpoint')
    for step in range(3):
        hub.update_scalar('loss', step / 2)
    hub.update_info('best', np.float64(0.5))
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    palettes = {kind: np.ones((2, 3), kind) for kind in ('uint8', 'int64', 'float32', 'bool')}
    written = {
        'meta': {'dataset_meta': {'classes': ('a', 'b'), **palettes}, 'epoch': 3},
        'message_hub': hub.state_dict(),
        'state_dict': model.state_dict(),
        'optimizer': optimizer.state_dict(),
    }
    path = tmp_path / 'epoch_3.pth'
    torch.save(written, path)
    found = CheckpointLoader.load_checkpoint(str(path), logger='silent')
    assert found['message_hub']['log_scalars']['loss'].mean() == 0.5
    assert found['message_hub']['runtime_info']['best'] == 0.5
    assert all(np.array_equal(found['meta']['dataset_meta'][kind], array) for kind, array in palettes.items())
    first, second = (found['state_dict'][f'{n}.weight'] for n in (0, 1))
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, model[0].weight)
    optimizer.load_state_dict(found['optimizer'])
    with path.open('rb') as file:
        assert torch.equal(reader.load(file)['state_dict']['0.weight'], first)
    path.write_bytes(b'')  # while what was read is alive
    assert float(first.sum()) == float(model[0].weight.detach().sum())


def test_names_of_numpy_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / 'old.pth'
    torch.save({'x': np.arange(3), 'y': np.float32(2)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    assert b'numpy.core.multiarray' in data
    path.write_bytes(data)
    found = reader.load(path)
    assert found['x'].tolist() == [0, 1, 2] and found['y'] == 2


# -- damaged archives --------------------------------------------------------------------------------------------------
def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, change: Any = lambda name, data: data) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def test_an_archive_that_is_compressed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'bomb.pth'
    torch.save({'x': torch.zeros(1_000_000)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    with pytest.raises(SlimError, match='what it holds is larger than it says'):
        reader.load(path)


def test_a_storage_is_never_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / 'short.pth'
    torch.save({'x': torch.ones(1000)}, path)
    rezipped(path, change=lambda name, data: data[:40] if '/data/0' in name else data)
    with pytest.raises(SlimError, match='truncated or not a checkpoint'):
        reader.load(path)


@pytest.mark.parametrize('share', (0.0, 0.2, 0.9, 0.999))
@pytest.mark.parametrize('zipped', (True, False))
def test_a_truncated_file_is_one_line(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / 'cut.pth'
    torch.save({'x': torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlimError, match=r'cut\.pth is truncated or not a checkpoint') as caught:
        reader.load(path)
    assert '\n' not in str(caught.value)


def test_other_pickles_are_no_checkpoints(tmp_path: Path, ran: Path) -> None:
    path = tmp_path / 'plain.pkl'
    path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(SlimError):
        reader.load(path)
    assert not ran.exists()


def test_bytes_are_read_where_torch_does_not_know_how_pickle_writes_them(tmp_path: Path) -> None:
    """A pickle of protocol 2 calls `_codecs.encode` for them, which torch 2.4 refuses."""
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {}, 'meta': {'state': b'\xff\x00'}}, path)
    assert read_checkpoint(path)['meta'] == {'state': b'\xff\x00'}
    with pytest.raises(pickle.UnpicklingError, match=r'_codecs\.encode to zip'):
        reader._encoded('', 'zip')
