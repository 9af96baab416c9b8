"""The package as a whole: versions, what imports what, what travels in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from mmcpd import compat, version

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = ('mmengine', 'mmcv', 'mmpretrain', 'mmseg')
BLOCK = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in {BLOCKED}:
            raise ModuleNotFoundError(f'blocked: {{name}}', name=name)
sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', BLOCK + code], cwd=ROOT, capture_output=True, text=True)


def test_pure_folders_import_without_openmmlab():
    result = run_blocked(
        'import pkgutil, importlib, mmcpd.comb, mmcpd.slim, mmcpd.prune, mmcpd.distill\n'
        'for package in (mmcpd.comb, mmcpd.slim, mmcpd.prune, mmcpd.distill):\n'
        '    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):\n'
        '        importlib.import_module(module.name)\n'
        'print("imported")'
    )
    assert result.stdout.strip() == 'imported', result.stderr


def test_the_block_is_real():
    result = run_blocked('import mmcpd.engine.build')
    assert result.returncode != 0
    assert 'blocked: mmengine' in result.stderr


def test_importing_mmcpd_imports_no_heavy_package():
    code = f'import sys, mmcpd; print([m for m in ("torch", "scipy", *{BLOCKED}) if m in sys.modules])'
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == '[]', result.stderr


@pytest.mark.parametrize(
    ('fault', 'lines'),
    [
        (
            "AssertionError('mmcv 2.9\\nis too new')",
            ['mmseg is installed, but cannot be imported (mmcv 2.9 is too new)'],
        ),
        (
            "ModuleNotFoundError('No mmcv._ext', name='mmcv._ext')",
            ['mmseg is installed, but cannot be imported (No mmcv'],
        ),
        ("ModuleNotFoundError('No mmseg', name='mmseg')", []),
    ],
    ids=['an assertion', 'without operators', 'absent'],
)
def test_a_package_that_cannot_be_imported_costs_one_line(fault, lines):
    code = f"""
import importlib.abc, sys
class Break(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'mmseg.models':
            raise {fault}
sys.meta_path.insert(0, Break())
import mmcpd.engine
print('CIFARResNet' in mmcpd.engine.models.__all__, 'LightHead' in mmcpd.engine.models.__all__)
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == 'True False', result.stderr
    said = [line for line in result.stderr.splitlines() if 'mmseg is installed' in line]
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))


@pytest.mark.parametrize(
    ('text', 'numbers'),
    [('2.14.1+cu130', (2, 14, 1)), ('0.10.8rc1', (0, 10, 8)), ('2.0.0', (2,)), ('dev', (0,)), ('0.0', (0,))],
)
def test_release(text, numbers):
    assert compat.release(text) == numbers


def pretend(monkeypatch, versions: dict[str, str]) -> None:
    def version(name):
        if name not in versions:
            raise compat.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(compat, 'version', version)


ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmpretrain': '1.3.6',
    'onedl-mmsegmentation': '1.4.2',
}
OPENMMLAB = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmpretrain': '1.2.0', 'mmsegmentation': '1.2.2'}


@pytest.mark.parametrize('versions', [ONEDL, OPENMMLAB], ids=['onedl', 'openmmlab'])
def test_both_families_of_names_are_accepted(monkeypatch, versions):
    pretend(monkeypatch, versions)
    compat.require('openmmlab')


@pytest.mark.parametrize('absent', ['mmsegmentation', 'mmpretrain'])
def test_one_of_classification_and_segmentation_will_do(monkeypatch, absent):
    pretend(monkeypatch, {k: v for k, v in OPENMMLAB.items() if k != absent})
    compat.require('openmmlab')


def test_what_is_there_may_not_be_too_old(monkeypatch):
    pretend(monkeypatch, {**OPENMMLAB, 'mmsegmentation': '0.30.0'})
    with pytest.raises(ImportError, match=r'mmsegmentation 0\.30\.0 is too old \(needs >= 1\.2\.2\)'):
        compat.require('openmmlab')


def test_an_error_names_package_versions_and_the_command(monkeypatch):
    pretend(monkeypatch, {'mmengine': '0.7.4', 'onedl-mmpretrain': '1.3.6'})
    with pytest.raises(ImportError) as error:
        compat.require('openmmlab')
    message = str(error.value)
    assert 'mmengine 0.7.4 is too old (needs >= 0.10.0)' in message
    assert 'onedl-mmcv is missing (needs >= 2.0.0)' in message
    assert message.endswith("pip install 'mmengine>=0.10.0' 'onedl-mmcv==2.3.6'")


def test_what_is_missing_is_proposed_from_the_family_that_is_there(monkeypatch):
    pretend(monkeypatch, {'mmengine': '0.10.7', 'mmsegmentation': '1.2.2'})
    with pytest.raises(ImportError, match=r"mmcv is missing.*pip install 'mmcv>=2\.0\.0'$"):
        compat.require('openmmlab')
    pretend(monkeypatch, {})
    with pytest.raises(ImportError, match=r"pip install 'onedl-mmengine==0\.10\.12' 'onedl-mmcv==2\.3\.6'$"):
        compat.require('openmmlab')


def test_the_newest_of_two_distributions_counts(monkeypatch):
    pretend(monkeypatch, {**OPENMMLAB, 'mmengine': '0.7.4', 'onedl-mmengine': '0.10.12'})
    compat.require('openmmlab')


def build(tmp_path: Path) -> zipfile.ZipFile:
    """Build the wheel from a copy: a build leaves files beside its sources."""
    source = tmp_path / 'source'
    source.mkdir()
    ignore = shutil.ignore_patterns('__pycache__', '.mim')
    for name in ('mmcpd', 'configs', 'tools'):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'model-index.yml'):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*command, '-w', str(tmp_path), str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob('mmcpd-*.whl')
    return zipfile.ZipFile(wheel)


def test_the_wheel_carries_a_command_configs_and_tools_and_replaces_nothing(tmp_path):
    with build(tmp_path) as wheel:
        names = set(wheel.namelist())
        commands = wheel.read(next(name for name in names if name.endswith('entry_points.txt'))).decode()
        metadata = wheel.read(next(name for name in names if name.endswith('METADATA'))).decode()
    for name in ('model-index.yml', 'configs/cpd/metafile.yml', 'tools/train.py', 'tools/dist_train.sh'):
        assert f'mmcpd/.mim/{name}' in names
    assert {'mmcpd/py.typed', 'mmcpd/cli/train.py'} <= names
    assert commands == '[console_scripts]\nmmcpd = mmcpd.__main__:main\n'
    assert not [name for name in names if name.startswith(('tests', 'configs', 'tools'))]
    required = [line for line in metadata.splitlines() if line.startswith('Requires-Dist')]
    hard = {line.split(': ')[1] for line in required if 'extra ==' not in line}
    assert hard == {'torch', 'numpy', 'scipy', 'executing; python_version < "3.11"'}
    assert 'Requires-Dist: onedl-mmcv==2.3.6; extra == "openmmlab"' in required


def test_the_citation_names_the_paper_of_the_package_and_its_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == version.__version__
    assert citation['license'] == 'Apache-2.0'
    assert citation['preferred-citation']['url'] == 'https://arxiv.org/abs/2408.03046'
