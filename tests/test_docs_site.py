"""The site holds together: its pages and links, what is read from the code, metafile, pictures and workflow."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.accuracy_picture import LOOKS, TABLES, draw, points
from benchmarks.accuracy_store import Store
from docs.scripts import combing_picture, messages, pages
from docs.scripts.options import arguments, class_rows, command_page, command_parser, config_page
from mmcpd.__main__ import COMMANDS
from mmcpd.engine import CombHook, Distiller, PruneHook
from mmcpd.engine.loss_configs import LOSSES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
SOURCES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(DOCS.glob('*.md'))]
LINK = re.compile(r'\]\(([^)\s]+)\)')
QUOTED = re.compile(r'`([^`]+)`')


class Loader(yaml.SafeLoader):
    """Read mkdocs.yml without running what its tags name."""


Loader.add_multi_constructor('tag:yaml.org,2002:python/', lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), Loader)


def nav_of(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in nav_of(each)]


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub write them."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S), re.M)
    return {re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', heading.lower())).strip('-') for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    faults = []
    for link in LINK.findall(re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)):
        path, _, anchor = link.partition('#')
        target = page if path == '' else page.parent / path
        if '://' in link or link.startswith('mailto:'):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding='utf-8'))):
            faults.append(link)
    return faults


@pytest.mark.parametrize('page', SOURCES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken(page, page.read_text(encoding='utf-8'))


def test_a_broken_link_is_found():
    assert broken(DOCS / 'zoo.md', '[a](results.md#latency) [b](../README.md)') == []
    assert broken(DOCS / 'zoo.md', '[a](result.md) [b](results.md#no-such)') == ['result.md', 'results.md#no-such']


def test_every_page_is_in_the_order_of_the_site_once():
    nav = nav_of(SITE['nav'])
    assert sorted(nav) == sorted([*(page.name for page in DOCS.glob('*.md')), *pages.names()])


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip('mkdocs', reason='mkdocs is not installed: make docs installs it')
    pytest.importorskip('mkdocstrings', reason='mkdocstrings is not installed: make docs installs it')
    env = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'WARNING' not in done.stderr, done.stderr
    for page in nav_of(SITE['nav']):
        folder = '' if page == 'index.md' else page.removesuffix('.md')
        assert (tmp_path / folder / 'index.html').is_file(), page
    options = (tmp_path / 'options' / 'index.html').read_text(encoding='utf-8')
    assert 'units_per_event' in options and '<table>' in options
    api = (tmp_path / 'api' / 'comb' / 'index.html').read_text(encoding='utf-8')
    assert '&gt;&gt;&gt; ' in api, 'examples are shown as code'


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_of_a_command_is_on_its_page(name):
    section = command_page().split(f'\n## mmcpd {name}\n')[1].split('\n## ')[0]
    parser = command_parser(name)
    assert parser.prog == f'mmcpd {name}'
    shown = [action for action in parser._actions if action.help not in (None, '==SUPPRESS==')]
    for action in shown:
        for option in action.option_strings:
            assert f'`{option}`' in section or option in ('-h', '--help')
    assert '`--no-such`' not in section and '`--cfg-options`' in section
    assert '<config>' not in re.sub('`[^`]*`', '', section), 'a browser takes it for a tag'


@pytest.mark.parametrize('kind', [PruneHook, CombHook, Distiller, *LOSSES.values()], ids=lambda kind: kind.__name__)
def test_every_option_of_a_config_is_on_the_page_with_its_default(kind):
    section = config_page().split(f'\n### {kind.__name__}\n')[1].split('\n### ')[0]
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            default = 'required' if parameter.default is parameter.empty else f'`{parameter.default!r}`'
            assert f'| `{name}` | {default} |' in section.replace('\\|', '|')


@pytest.mark.parametrize('kind', [PruneHook, CombHook, Distiller], ids=lambda kind: kind.__name__)
def test_every_option_of_a_hook_says_what_it_means(kind):
    assert [name for name, _, text in class_rows(kind) if not text] == []


def test_arguments_of_a_docstring():
    text = 'Add.\n\nArgs:\n    a, b: Two,\n        both whole.\n    c (int): One: last.\n\nRaises:\n    E: no.'
    assert arguments(text) == {'a': 'Two, both whole.', 'b': 'Two, both whole.', 'c': 'One: last.'}


def in_code(quoted: str, texts: list[str]) -> bool:
    """Say whether the words of a message, values left out, stand in one text of the code, in their order."""
    words = [part.strip() for part in quoted.split('...') if part.strip()]

    def has_all(text: str) -> bool:
        end = 0
        for word in words:
            if (start := text.find(word, end)) < 0:
                return False
            end = start + len(word)
        return True

    return any(has_all(text) for text in texts)


def quoted_messages() -> list[str]:
    text = (DOCS / 'troubleshooting.md').read_text(encoding='utf-8')
    tables = [part for part in text.split('\n## ') if '| message | cure |' in part]
    rows = [line for part in tables for line in part.splitlines() if line.startswith('| `')]
    return [quoted for row in rows for quoted in QUOTED.findall(row.split(' | ')[0])]


def test_every_message_in_troubleshooting_is_one_of_the_code():
    found, texts = quoted_messages(), messages.texts().splitlines()
    assert len(found) > 40
    assert [quoted for quoted in found if not in_code(quoted, texts)] == []
    assert not in_code('... is refused: to read it is to walk ...', texts)


def test_the_page_of_messages_has_those_of_the_errors_of_mmcpd():
    page = messages.message_page()
    assert '- `no group ...: did you mean ...?` (ValueError)' in page
    assert len(messages.messages()) > 250
    assert messages.template(messages.ast.parse("f'{path} is ' + 'damaged'").body[0].value) == '... is damaged'


def test_the_metafile_has_the_figures_of_the_results_alone():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert set(index) == {'Import'}
    results = (DOCS / 'results.md').read_text(encoding='utf-8')
    shown = 0
    for file in index['Import']:
        content = yaml.safe_load((ROOT / file).read_text())
        collections = {each['Name'] for each in content['Collections']}
        for model in content['Models']:
            assert model['In Collection'] in collections and (ROOT / model['Config']).is_file()
            for result in model.get('Results', ()):
                assert set(result) == {'Task', 'Dataset', 'Metrics'}
                name, line = Path(model['Config']).stem, ''
                for line in results.splitlines():
                    if f'`{name}`' in line:
                        break
                else:  # the seeds of the ResNet-50 have a table of their own
                    line = results.split(f'configs/cpd/{name}.py')[1].split('\n## ')[0]
                shown += all(f'{value:.2f}' in line for value in result['Metrics'].values())
    assert shown == sum(len(model.get('Results', ())) for model in content['Models']) > 5


def stores() -> dict[str, Store]:
    return {name: Store(ROOT / 'benchmarks' / 'results' / f'accuracy_{name}.json') for name in TABLES}


def test_the_picture_of_the_readme_shows_the_figures_of_its_table(tmp_path):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'docs/images/accuracy.svg' in text
    for recipe in LOOKS:
        row = next(line for line in text.splitlines() if line.startswith(f'| {recipe} |')).split(' | ')[1:]
        for cell, store in zip(row, stores().values(), strict=False):
            found = points(store.read('rows'), recipe).get(0.5)
            assert cell.startswith(f'{found[0]:.2f}' if found else '-')
    draw(stores(), tmp_path / 'new.svg')
    for file in (tmp_path / 'new.svg', DOCS / 'images' / 'accuracy.svg'):
        drawn = file.read_text(encoding='utf-8')
        assert all(label in drawn for label in (*LOOKS, *TABLES.values(), 'test accuracy, %'))


def test_the_picture_of_combing_is_what_combing_finds():
    drawn = combing_picture.draw()
    assert drawn == (DOCS / 'images' / 'combing.svg').read_text(encoding='utf-8')
    assert '6 channels, group 1' in drawn and '8 channels, group 2' in drawn and 'the classes: frozen' in drawn


def test_the_workflow_runs_what_contributors_run():
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())
    check, docs = (workflow['jobs'][name] for name in ('check', 'docs'))
    assert check['runs-on'] == 'ubuntu-latest'
    assert [step['run'] for step in check['steps'] if 'run' in step] == ['./.ci/run']
    assert os.access(ROOT / '.ci' / 'run', os.X_OK)
    (python,) = (step['with']['python-version'] for step in check['steps'] if 'python' in step.get('uses', ''))
    assert python == '3.11'
    assert [step['run'] for step in docs['steps'] if 'run' in step] == ['make docs']
    assert re.search(r'^docs: env', (ROOT / 'Makefile').read_text(), re.M)


def test_a_config_that_is_shown_whole_is_whole():
    shown = (DOCS / 'your_model.md').read_text(encoding='utf-8')
    config = (ROOT / 'configs' / 'cpd' / 'mobilevit_prune.py').read_text(encoding='utf-8')
    assert f'```python\n{config[config.index("_base_") :]}```' in shown


def test_the_readme_keeps_its_two_commands():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert re.search(r'^    make demo ', text, re.M) and re.search(r'^    make test ', text, re.M)
