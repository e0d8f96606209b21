"""The claims of the methods, each with the figures that answer it and a verdict by one rule."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from finetune import FULL, HEAD_ALONE
from summary import Run, Runs, compare, mebibytes, percent, steps_of, steps_to, trained

VERDICT = {1: "**shows**", 0: "**does not show at this size**: the difference is within the spread", -1: "**is reversed**"}
KEPT = {1: "with a gain of accuracy", 0: "without a loss of accuracy", -1: "with a loss of accuracy"}
PEAK = {1: "is higher", 0: "does not differ beyond the spread", -1: "is lower"}
ENOUGH = 2
"""Seeds without which there is no spread, and so no verdict."""
Answer = Callable[[list[Run], list[Run], float], str]


def table_of_claims(runs: Runs, fixed: float) -> str:
    """Claims whose rows were not run are left out."""
    lines = [
        f"| {claim} | {answer(runs[first], runs[second], fixed)} |"
        for claim, answer, first, second in CLAIMS
        if first in runs and second in runs
    ]
    return "\n".join(["| claim | what was measured |", "|---|---|", *lines])


def faster(one: list[Run], other: list[Run], fixed: float) -> str:
    first, second = ([steps_to(run, fixed) for run in own] for own in (one, other))
    shown = f"steps to the loss: {steps_of(first)}, against {steps_of(second)}"
    if not any(first) and not any(second):
        return f"{shown}: cannot be told"
    counted = [
        [-(step or len(run["losses"]) + 1) for step, run in zip(steps, own, strict=True)] for steps, own in ((first, one), (second, other))
    ]
    return f"{shown}: {judged(one, other, VERDICT[compare(*counted)])}"


def better(one: list[Run], other: list[Run], fixed: float) -> str:
    return f"accuracy {accuracies(one, other)}: {judged(one, other, VERDICT[_accuracy(one, other)])}"


def smaller(one: list[Run], other: list[Run], fixed: float) -> str:
    """Fewer numbers, and no loss of accuracy."""
    first, second = (mean(run["trained"] for run in own) for own in (one, other))
    shown = f"trained numbers: {trained(one)}, against {trained(other)}; accuracy {accuracies(one, other)}"
    return f"{shown}: {judged(one, other, _saved(first, second, 'numbers', _accuracy(one, other)))}"


def lighter(one: list[Run], other: list[Run], fixed: float) -> str:
    """Fewer bytes of weights, and no loss of accuracy; and what that is of the process's memory."""
    own, whole = one[0]["site_bytes"], other[0]["site_bytes"]
    stored, half, full = (f"{size / 2**20:.1f}" for size in (own["stored"], own["in_16_bits"], own["in_32_bits"]))
    peak = compare(*([run["peak"] for run in each] for each in (one, other)))
    shown = [
        f"weights of the adapted layers: {stored} MiB, against {half} MiB in 16 bits and {full} in 32",
        f"training added {mebibytes(one, 'peak_growth')} MiB, against {mebibytes(other, 'peak_growth')}",
        f"peak of the process: {mebibytes(one, 'peak')} MiB, against {mebibytes(other, 'peak')}",
        f"accuracy {accuracies(one, other)}",
    ]
    verdict = _saved(own["stored"], whole["stored"], "bytes of weights", _accuracy(one, other))
    return f"{'; '.join(shown)}: {judged(one, other, f'{verdict}; the peak {PEAK[peak]}')}"


def accuracies(one: list[Run], other: list[Run]) -> str:
    return f"{percent([run['accuracy'] for run in one])}, against {percent([run['accuracy'] for run in other])}"


def judged(one: list[Run], other: list[Run], verdict: str) -> str:
    return verdict if min(len(one), len(other)) >= ENOUGH else "too few seeds for a verdict"


def _accuracy(one: list[Run], other: list[Run]) -> int:
    return compare([run["accuracy"] for run in one], [run["accuracy"] for run in other])


def _saved(first: float, second: float, what: str, accuracy: int) -> str:
    verdict = "**shows**" if first < second and accuracy >= 0 else "**does not show**"
    return f"{verdict}: {first / second:.2f} times the {what}, {KEPT[accuracy]}"


SAME = "lora, same base rate"
CLAIMS: list[tuple[str, Answer, str, str]] = [
    ("LoRA+ trains faster than LoRA at the same base rate", faster, "loraplus", SAME),
    ("… and than LoRA at a rate chosen for LoRA", faster, "loraplus", "lora"),
    ("The notes' choice, A with the larger rate, trains faster than LoRA at the same base rate", faster, "loraplus, A fast", SAME),
    ("… and than B with the larger rate", faster, "loraplus, A fast", "loraplus"),
    ("AdaLoRA, energy: LoRA's accuracy with fewer numbers", smaller, "adalora, energy", "lora"),
    ("AdaLoRA, budget: LoRA's accuracy with fewer numbers", smaller, "adalora, budget", "lora"),
    ("AdaLoRA, budget, is more accurate than LoRA", better, "adalora, budget", "lora"),
    ("QLoRA: less memory at LoRA's accuracy", lighter, "qlora", "lora"),
    ("DoRA is more accurate than LoRA", better, "dora", "lora"),
    ("LoRA: the accuracy of full fine-tuning with fewer numbers", smaller, "lora", FULL),
    ("LoRA is more accurate than the head alone", better, "lora", HEAD_ALONE),
]
