"""The code in the docs runs: Python as it stands, configs are read and built, command lines pass the real parsers.

A Python block that cannot run here has the line `<!-- not run: the reason -->` above it.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from docs.scripts.options import command_parser
from mmcpd import compat
from mmcpd.__main__ import COMMANDS
from mmcpd.cli.checks import check_hooks
from mmcpd.cli.configs import read_config
from mmcpd.comb.rules.table import OPERATIONS
from mmcpd.prune import IMPORTANCES
from mmcpd.registry import MODELS
from mmcpd.slim.shape_attributes import SHAPE_ATTRS
from tests.test_tools.conftest import TINY
from tests.test_tools.test_onnx_file import save_half

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(
    r'(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^``` ?(?P<kind>[a-z]*)[^\n]*\n(?P<text>.*?)^```', re.M | re.S
)
YOURS = """_base_ = 'path/to/your_config.py'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5)))
"""
TARGETS = set(re.findall(r'^([a-z -]+):', (ROOT / 'Makefile').read_text(), re.M))
TARGETS = {word for line in TARGETS for word in line.split()}


@dataclass(frozen=True)
class Block:
    """A block of Python of a page, and why it is not run, or nothing."""

    page: Path
    text: str
    why: str

    @property
    def is_config(self) -> bool:
        return '_base_' in self.text

    @property
    def is_new_style(self) -> bool:
        return 'read_base' in self.text


def python_of(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding='utf-8'))
    return [Block(page, each['text'], each['why'] or '') for each in found if each['kind'] in ('python', 'py')]


def commands_in(text: str) -> list[str]:
    """Return the command lines of a page: in blocks of no language or a shell's, indented, and in backquotes."""
    lines = [line for each in BLOCK.finditer(text) if each['kind'] in ('', 'sh', 'bash', 'shell', 'console')
             for line in each['text'].replace('\\\n', ' ').splitlines()]  # fmt: skip
    rest = BLOCK.sub('', text)
    lines += [line.strip() for line in re.findall(r'^(?: {4}| {8})\S.*$', rest.replace('\\\n', ' '), re.M)]
    lines += [f'{span} ...' for span in re.findall(r'`((?:mmcpd|python tools/\w+\.py) [^`.]+(?:\.\w[^`.]*)*)`', rest)]
    return [re.sub(r'^\$ |^OMP_NUM_THREADS=\d+ ', '', line.strip()) for line in lines]


def fault_of(line: str) -> str | None:
    """Return what is wrong with a command line, None where nothing is or it is not ours."""
    words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 and line.count('"') % 2 == 0 else line.split()
    match words:
        case ['mmcpd', ('COMMAND' | '--help' | '--version'), *_]:
            return None
        case ['mmcpd', name, *arguments] | ['python', '-m', 'mmcpd', name, *arguments]:
            return of_command(name, arguments)
        case ['python', script, *arguments] if re.fullmatch(r'tools/\w+\.py', script):
            return of_command(Path(script).stem.replace('_', '-'), arguments)
        case ['python', script, *arguments] if script.endswith('.py'):
            return of_script(script, arguments)
        case ['python', '-m', 'pytest', *arguments]:
            gone = [word for word in arguments if word.startswith('tests') and not (ROOT / word).exists()]
            return f'{gone[0]} is not there' if gone else None
        case ['make', *targets]:
            unknown = [word for word in targets if '=' not in word and word not in TARGETS]
            return f'make knows no {unknown[0]}' if unknown else None
        case ['pip', 'install', *arguments]:
            extras = [name for word in arguments for name in re.findall(r'^\.\[(.+)\]$', word)]
            known = {*compat.extras(), 'dev', 'all'}
            return next((f'there is no extra {name}' for name in extras if name not in known), None)
    return None


def of_command(name: str, arguments: list[str]) -> str | None:
    if name not in COMMANDS:
        return f'mmcpd has no command {name}'
    arguments = ['1' if re.fullmatch('[A-Z]{2,}', word) else word for word in arguments]  # a value of the reader's
    parser = command_parser(name)
    if arguments[-1:] in (['...'], ['--help']):  # in a sentence: what comes first may be left out
        arguments.pop()
        for action in parser._actions:
            action.required = False
            if not action.option_strings:
                action.nargs = '?'
    try:
        parser.parse_args(arguments)
    except SystemExit:
        return 'the parser refuses it'
    return None


def of_script(script: str, arguments: list[str]) -> str | None:
    """Look for options in the source of a script and of the benchmarks that it imports."""
    path = ROOT / script
    if not path.is_file():
        return f'{script} is not there'
    source = path.read_text(encoding='utf-8')
    for name in re.findall(r'benchmarks(?:\.| import )(\w+)', source):
        if (other := ROOT / 'benchmarks' / f'{name}.py').is_file():
            source += other.read_text(encoding='utf-8')
    options = [word.split('=')[0] for word in arguments if word.startswith('--')]
    return next((f'{script} has no {option}' for option in options if f"'{option}'" not in source), None)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with what the pages speak of: a config, one that prunes it, our configs and tools."""
    for part in ('configs', 'tools'):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / 'tiny.py').write_text(TINY.format(root=str(ROOT)))
    (tmp_path / 'path' / 'to').mkdir(parents=True)
    Config.fromfile(tmp_path / 'tiny.py').dump(tmp_path / 'path' / 'to' / 'your_config.py')
    (tmp_path / 'your_prune.py').write_text(YOURS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tables():
    """Put back what a page enters into the tables of mmcpd."""
    kept = dict(OPERATIONS), dict(IMPORTANCES), list(SHAPE_ATTRS)
    yield
    for table, old in zip((OPERATIONS, IMPORTANCES), kept[:2], strict=True):
        table.clear()
        table.update(old)
    SHAPE_ATTRS[:] = kept[2]


def names() -> dict[str, object]:
    """Return what a page may use without making it: a model and its data, as a reader has them."""
    torchvision = pytest.importorskip('torchvision')
    torch.manual_seed(0)
    return {
        'model': torchvision.models.resnet18().eval(),
        'images': torch.rand(2, 3, 64, 64),
        'labels': torch.tensor([1, 2]),
    }


def read(block: Block, place: Path) -> Config:
    """Write a config where its `_base_` is, read it as the commands do, and check its hooks."""
    file = (place / 'path' / 'to' if block.is_new_style else place) / 'page.py'
    own = re.search(r'^_base_ =', block.text, re.M) or block.is_new_style
    file.write_text(block.text if own else f"_base_ = 'path/to/your_config.py'\n{block.text}")
    cfg = read_config(command_parser('train').parse_args([str(file)]))
    check_hooks(cfg)
    return cfg


def without(block: Block) -> str | None:
    """Return a package that a block needs and that is not installed."""
    needed = re.findall(r"'(mmpretrain|mmseg|mmdet|mmpose|mmaction)::", block.text)
    needed += re.findall(r'^(?:import|from) (\w+)', block.text, re.M)
    return next((name for name in needed if find_spec(name) is None), None)


WITH_PYTHON = [page for page in PAGES if python_of(page)]


@pytest.mark.parametrize('page', WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, place, tables):
    blocks = [block for block in python_of(page) if not block.why]
    code = [block for block in blocks if not block.is_config and not block.is_new_style]
    if any('slim.pth' in block.text for block in code):
        (place / 'work_dirs').mkdir()
        save_half(place / 'your_prune.py').parent.rename(place / 'work_dirs' / 'your_prune')
    known = names() if code else {}
    missing = []
    for block in blocks:
        if (package := without(block)) is not None:
            missing.append(package)
        elif block in code:
            exec(compile(block.text, page.name, 'exec', dont_inherit=True), known)
        else:
            cfg = read(block, place)
            if 'your_config' in block.text or not re.search('^_base_ =', block.text, re.M):
                with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                    MODELS.build(cfg.model)
    if missing:
        pytest.skip(f'{page.name}: not installed: {", ".join(missing)}; the other blocks ran')


def test_a_config_that_is_wrong_is_found(place):
    right = Block(place, YOURS, '')
    assert read(right, place).default_hooks.prune.target.macs == 0.5
    wrong = Block(place, YOURS.replace('target=', 'traget='), '')
    with pytest.raises(Exception, match='did you mean target'):
        read(wrong, place)


def test_a_block_that_does_not_run_says_why():
    found = BLOCK.search('<!-- not run: needs a phone -->\n```python\nimport phone\n```\n')
    assert found is not None and found['why'] == 'needs a phone'
    for page in WITH_PYTHON:
        for block in python_of(page):
            ast.parse(block.text)
            assert block.why == '' or len(block.why.split()) > 2, f'{page.name}: {block.why}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_command_lines_of_a_page_are_taken(page, capsys):
    lines = commands_in(page.read_text(encoding='utf-8'))
    faults = [f'{line}: {fault}' for line in lines if (fault := fault_of(line))]
    assert not faults, capsys.readouterr().err


def test_the_pages_have_command_lines():
    lines = [line for page in PAGES for line in commands_in(page.read_text(encoding='utf-8'))]
    assert {line.split()[1] for line in lines if line.startswith('mmcpd ')} >= set(COMMANDS)
    assert any(line.startswith('python benchmarks/') for line in lines)


@pytest.mark.parametrize(
    'line',
    [
        'mmcpd prune c.py c.pth --targets macs=0.5',
        'mmcpd prune c.py',
        'mmcpd shrink c.py',
        'python tools/deploy.py c.py slim.pth --batch two',
        'python benchmarks/latency.py --no-such-option',
        'python benchmarks/nowhere.py',
        'python -m pytest tests/test_nothing.py',
        'make a-cake',
        "pip install -e '.[everything]'",
    ],
)
def test_a_command_line_that_is_wrong_is_found(line, capsys):
    assert fault_of(line) is not None
    assert fault_of(commands_in(f'Text:\n\n    {line}\n')[0]) is not None


def test_what_the_page_on_torch_pruning_names_is_there():
    tp = pytest.importorskip('torch_pruning')
    text = (ROOT / 'docs' / 'coming_from.md').read_text(encoding='utf-8')
    found = set(re.findall(r'`tp\.([\w.]+)`', text))
    assert len(found) > 8
    for path in found:
        reduce(getattr, path.split('.'), tp)
    options = inspect.signature(tp.pruner.BasePruner).parameters
    for option in ('pruning_ratio_dict', 'ignored_layers', 'prune_head_dims', 'root_module_types', 'iterative_steps'):
        assert option in text and option in options
