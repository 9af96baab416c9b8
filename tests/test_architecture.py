"""The arrows between the parts of the package point one way, and no import runs in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmcpd

ROOT = Path(mmcpd.__file__).parent
# From the bottom up: each part may import itself and what stands in its row.
BOTTOM = {'errors', 'names', 'version', 'compat', 'progress', 'files', 'random_state', 'modes', 'nested'}
ALLOWED = {
    'cost': BOTTOM,
    'fixes': BOTTOM,
    'example': BOTTOM,
    'coupling': {'cost', 'fixes', 'example', *BOTTOM},
    'layer_calls': {'compat'},
    'slim': {'coupling', 'example', 'cost', 'fixes', *BOTTOM},
    'comb': {'slim', 'coupling', 'example', 'cost', 'fixes', *BOTTOM},
    'prune': {'slim', 'coupling', 'example', 'cost', 'layer_calls', *BOTTOM},
    'rotate': {'slim', 'coupling', 'example', 'layer_calls', *BOTTOM},
    'refit': {'slim', 'coupling', 'example', 'layer_calls', *BOTTOM},
    'distill': BOTTOM,
    'deploy': {'slim', 'coupling', 'cost', *BOTTOM},
    'report': {'coupling', 'cost', *BOTTOM},
    'registry': BOTTOM,
    'models': {*BOTTOM, 'registry'},
    'datasets': {*BOTTOM, 'registry'},
    'engine': {
        'comb',
        'slim',
        'prune',
        'rotate',
        'refit',
        'distill',
        'report',
        'models',
        'datasets',
        'registry',
        'coupling',
        'example',
        'cost',
        'deploy',
        *BOTTOM,
    },
    'cli': {'engine', 'deploy', 'report', 'comb', 'slim', 'prune', 'rotate', 'registry', 'coupling', *BOTTOM},
    '__main__': {'cli', 'engine', *BOTTOM},
}
PURE = (
    'comb', 'slim', 'prune', 'rotate', 'refit', 'distill', 'report',
    'layer_calls', 'coupling', 'example', 'cost', 'fixes', 'random_state', 'modes', 'nested',
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): path for path in ROOT.rglob('*.py') if '.mim' not in path.parts}


def imports(name: str, at_import: bool = False) -> set[str]:
    """Return what a module imports, by full name; `at_import` leaves out what stands inside functions."""
    path = MODULES[name]
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = [tree]
    found: set[str] = set()
    while nodes:
        node = nodes.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test) and at_import:
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            found.update(m if (m := f'{module}.{alias.name}') in MODULES else module for alias in node.names)
    return found


@pytest.mark.parametrize('name', sorted(MODULES))
def test_arrows_point_down(name):
    part = [*name.split('.'), ''][1]
    if part and part not in BOTTOM:
        used = {target.split('.')[1] for target in imports(name) if target.startswith('mmcpd.')}
        assert used <= {*ALLOWED[part], part}, f'{name} imports {sorted(used - ALLOWED[part] - {part})}'


@pytest.mark.parametrize('name', sorted(MODULES))
def test_pure_parts_import_no_openmmlab(name):
    part = [*name.split('.'), ''][1]
    if part in PURE:
        roots = {target.partition('.')[0] for target in imports(name)}
        assert not roots & {'mmengine', 'mmcv', 'mmpretrain', 'mmseg', 'mmdet'}


def test_there_is_no_import_circle():
    graph = {name: {t for t in imports(name, at_import=True) if t in MODULES and t != name} for name in MODULES}
    # A package's own __init__ is run before its modules; what counts is what they ask for by name.
    order: list[str] = []
    state: dict[str, bool] = {}  # False while it is being visited

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name):
            return
        assert name not in state, f'a circle: {" -> ".join((*path[path.index(name) :], name))}'
        state[name] = False
        for target in sorted(graph[name]):
            visit(target, (*path, name))
        state[name] = True
        order.append(name)

    for name in sorted(MODULES):
        visit(name, ())
    assert len(order) == len(MODULES)


def test_the_checks_can_fail(monkeypatch, tmp_path):
    one, two = tmp_path / 'one.py', tmp_path / 'two.py'
    one.write_text('from mmcpd.two import x')
    two.write_text('from .one import y\nimport mmengine')
    monkeypatch.setitem(MODULES, 'mmcpd.one', one)
    monkeypatch.setitem(MODULES, 'mmcpd.two', two)
    assert imports('mmcpd.one') == {'mmcpd.two'} and imports('mmcpd.two') == {'mmcpd.one', 'mmengine'}
    with pytest.raises(AssertionError, match=r'a circle: mmcpd\.one -> mmcpd\.two -> mmcpd\.one'):
        test_there_is_no_import_circle()
