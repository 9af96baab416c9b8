"""Run all four distillation studies, seed by seed, so that whatever is finished is a whole seed.

OMP_NUM_THREADS=1 python benchmarks/study_all.py --seeds 0 1 2
python benchmarks/study_all.py --report
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import study_classes, study_distillers, study_sparsity, study_teachers
from benchmarks.studies import main

STUDIES = [study.STUDY for study in (study_distillers, study_classes, study_teachers, study_sparsity)]

if __name__ == '__main__':
    main(__doc__.splitlines()[0], STUDIES)
