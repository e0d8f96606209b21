"""Compare the claims about the methods with the measured figures, all by one rule."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from finetune import FULL, HEAD_ALONE
from summary import Run, Runs, compare, mebibytes, percent, steps_of, steps_to, trained

VERDICT = {1: "**confirmed**", 0: "**inconclusive**: the difference is within the spread", -1: "**contradicted**"}
KEPT = {1: "with higher accuracy", 0: "without loss of accuracy", -1: "with lower accuracy"}
PEAK = {1: "is higher", 0: "does not differ beyond the spread", -1: "is lower"}
ENOUGH = 2
"""Least number of seeds from which a spread, and so a verdict, can be computed."""
Answer = Callable[[list[Run], list[Run], float], str]


def table_of_claims(runs: Runs, fixed: float) -> str:
    """Return the table of all claims whose rows were run."""
    lines = [
        f"| {claim} | {answer(runs[first], runs[second], fixed)} |"
        for claim, answer, first, second in CLAIMS
        if first in runs and second in runs
    ]
    return "\n".join(["| claim | measured |", "|---|---|", *lines])


def faster(one: list[Run], other: list[Run], fixed: float) -> str:
    first, second = ([steps_to(run, fixed) for run in own] for own in (one, other))
    shown = f"steps to the target loss: {steps_of(first)}, against {steps_of(second)}"
    if not any(first) and not any(second):
        return f"{shown}: not reached by either"
    counted = [
        [-(step or len(run["losses"]) + 1) for step, run in zip(steps, own, strict=True)] for steps, own in ((first, one), (second, other))
    ]
    return f"{shown}: {judged(one, other, VERDICT[compare(*counted)])}"


def better(one: list[Run], other: list[Run], fixed: float) -> str:
    return f"accuracy {accuracies(one, other)}: {judged(one, other, VERDICT[_accuracy(one, other)])}"


def smaller(one: list[Run], other: list[Run], fixed: float) -> str:
    """Judge whether `one` trains fewer parameters without loss of accuracy."""
    first, second = (mean(run["trained"] for run in own) for own in (one, other))
    shown = f"trained parameters: {trained(one)}, against {trained(other)}; accuracy {accuracies(one, other)}"
    return f"{shown}: {judged(one, other, _saved(first, second, 'parameters', _accuracy(one, other)))}"


def lighter(one: list[Run], other: list[Run], fixed: float) -> str:
    """Judge whether `one` stores fewer bytes of weights without loss of accuracy, and report the process's memory."""
    own, whole = one[0]["site_bytes"], other[0]["site_bytes"]
    stored, half, full = (f"{size / 2**20:.1f}" for size in (own["stored"], own["in_16_bits"], own["in_32_bits"]))
    peak = compare(*([run["peak"] for run in each] for each in (one, other)))
    shown = [
        f"weights of the adapted layers: {stored} MiB, against {half} MiB in 16-bit and {full} in 32-bit dtypes",
        f"memory added by training: {mebibytes(one, 'peak_growth')} MiB, against {mebibytes(other, 'peak_growth')}",
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
    verdict = "**confirmed**" if first < second and accuracy >= 0 else "**not confirmed**"
    return f"{verdict}: {first / second:.2f} times the {what}, {KEPT[accuracy]}"


SAME = "lora, same base rate"
CLAIMS: list[tuple[str, Answer, str, str]] = [
    ("LoRA+ trains faster than LoRA at the same base rate", faster, "loraplus", SAME),
    ("LoRA+ trains faster than LoRA at a learning rate chosen for LoRA", faster, "loraplus", "lora"),
    ("LoRA+ with the larger rate for A trains faster than LoRA at the same base rate", faster, "loraplus, A fast", SAME),
    ("LoRA+ with the larger rate for A trains faster than with the larger rate for B", faster, "loraplus, A fast", "loraplus"),
    ("AdaLoRA, energy: LoRA's accuracy with fewer parameters", smaller, "adalora, energy", "lora"),
    ("AdaLoRA, budget: LoRA's accuracy with fewer parameters", smaller, "adalora, budget", "lora"),
    ("AdaLoRA, budget, is more accurate than LoRA", better, "adalora, budget", "lora"),
    ("QLoRA: less memory at LoRA's accuracy", lighter, "qlora", "lora"),
    ("DoRA is more accurate than LoRA", better, "dora", "lora"),
    ("LoRA: the accuracy of full fine-tuning with fewer parameters", smaller, "lora", FULL),
    ("LoRA is more accurate than the head alone", better, "lora", HEAD_ALONE),
]
