"""transformers does not import scikit-learn, and other code can."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import rlhf, transformers.generation.candidate_generator
assert "sklearn" not in sys.modules
from sklearn.metrics import roc_curve
"""


def test_only_other_code_imports_scikit_learn() -> None:
    pytest.importorskip("sklearn", reason="comes with the extra `suites`")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
