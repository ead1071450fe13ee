"""Hold the rewards of the responses in a file, a row each, and the table of `rlhf reward`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    reward: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """A response. A failure on any response of the group leaves the whole group without scores, as in a run."""

    place: str  # `file:line`
    group: int  # rows of one group answer one prompt
    score: float | None  # weighted sum
    scores: Mapping[str, float | None]  # each applicable reward, before its gate and weight; None: no opinion
    errors: tuple[RowError, ...]  # of this response


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredFile:
    rows: tuple[ScoredRow, ...]

    @property
    def num_unscored(self) -> int:
        return sum(row.score is None for row in self.rows)

    @property
    def errors(self) -> list[tuple[str, RowError]]:
        """Return all errors, each with file and line of the row."""
        return [(row.place, error) for row in self.rows for error in row.errors]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def to_table(self) -> Table:
        """Return a table with a line per reward: values, and errors by kind."""
        from rich.table import Table

        table = Table()
        for heading in ("reward", "rows", "mean", "lowest", "highest", "errors"):
            table.add_column(heading, justify="left" if heading in ("reward", "errors") else "right")
        failed: dict[str, Counter[str]] = {}
        for _, error in self.errors:
            failed.setdefault(error.reward, Counter())[error.kind] += 1
        names = dict.fromkeys([*(name for row in self.rows for name in row.scores), *failed])
        for name in names:
            values = [value for row in self.rows if (value := row.scores.get(name)) is not None]
            failures = ", ".join(f"{count} {kind}" for kind, count in sorted(failed.get(name, Counter()).items()))
            table.add_row(name, *_summary(values), failures)
        table.add_section()
        table.add_row("score", *_summary([row.score for row in self.rows if row.score is not None]), "")
        return table


def _summary(values: Sequence[float]) -> list[str]:
    if not values:
        return ["0", "", "", ""]
    return [str(len(values)), *(f"{value:.4g}" for value in (sum(values) / len(values), min(values), max(values)))]
