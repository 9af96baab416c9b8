"""Package mmcpd; its configs and tools travel in the wheel as `mmcpd/.mim`, where MMEngine and mim look."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Put configs and tools beside the modules: copies in a wheel, links in an editable install."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, 'editable_mode', False)
        target = (ROOT if editable else Path(self.build_lib)) / 'mmcpd' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM:
            source = ROOT / name
            if editable:
                (target / name).symlink_to(source, target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, target / name)


def extras() -> dict[str, list[str]]:
    """Return the extras: those of the version table, `dev` for those who work on mmcpd, and `all` of them."""
    table = runpy.run_path(str(ROOT / 'mmcpd' / 'compat.py'))['extras']()
    table['dev'] = ['einops', 'pytest>=8', 'pytest-xdist>=3', 'hypothesis>=6.100', 'ruff>=0.17,<0.18', 'mypy>=1.10']
    table['all'] = sorted({requirement for part in table.values() for requirement in part})
    return table


setup(
    name='mmcpd',
    version=runpy.run_path(str(ROOT / 'mmcpd' / 'version.py'))['__version__'],
    description='Comb, prune, distil and slim any vision model of OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8') if (ROOT / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    author='mmcpd maintainers',
    license='Apache-2.0',
    project_urls={'Paper': 'https://arxiv.org/abs/2408.03046'},
    keywords='pruning, distillation, model compression, OpenMMLab',
    python_requires='>=3.10',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['mmcpd', 'mmcpd.*']),
    package_data={'mmcpd': ['py.typed']},
    entry_points={'console_scripts': ['mmcpd = mmcpd.__main__:main']},
    # No bounds: installing mmcpd must never replace the torch that somebody's mmcv was compiled against.
    # `import mmcpd` checks the versions and names the command that mends them.
    install_requires=['torch', 'numpy', 'scipy', 'executing; python_version < "3.11"'],
    extras_require=extras(),
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
