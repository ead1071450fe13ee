"""A tree of any strings written as YAML is read back unchanged."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.config.files.base_file import read_tree
from rlhf.config.yaml_tree import to_yaml

TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t:#'\"-"), max_size=12
)
LOOKALIKES = st.sampled_from(
    ["off", "yes", "null", "~", "", "1e-6", "1_000", "0x1f", "007", "1:30", ".inf", "2020-01-01", "=", "<<"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT | LOOKALIKES
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | LOOKALIKES, inner, max_size=3),
    max_leaves=8,
)


@given(tree=st.dictionaries(TEXT | LOOKALIKES, VALUES, min_size=1, max_size=4))
@example(tree={"off": [True, "true", 1, "1", 1.0, "1.0", 1e-06, "1e-06", None, "null"]})
def test_round_trip(tree: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.yaml"
        path.write_text(to_yaml(tree), encoding="utf-8")
        again = read_tree(path).values
    assert again == tree
    assert repr(again) == repr(tree)  # True is not 1, and 1 not 1.0
