"""The page of what was measured, made from its results alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import allocation
from merge_report import table
from speed_rows import DORA, FROZEN, LORA, PEFT_DORA, PEFT_LORA

Results = Mapping[str, Any]
Part = Mapping[str, Any]


def page(results: Results) -> str:
    found = results["machine"]
    return PAGE.format(
        machine=f"{found['cores']} cores of {found['cpu']} with {found['instructions']}, {found['system']}",
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items() if name != "cp"),
        targets=table(
            ["target", "measured", ""], [[text, figure, "met" if met else "**not met**"] for text, figure, met in targets(results)]
        ),
        steps=step_tables(results["steps"], "step"),
        forwards=step_tables(results["steps"], "forward"),
        memory=memory_table(results["memory"]),
        batches=batch_table(results["batches"][0]),
        allocation=allocation.table(results["allocation"][0]),
        attaching=seconds_table({name: results["attaching"][0][name] for name in ("torchgraft", "PEFT")}),
        sites=results["attaching"][0]["sites"],
        starting=seconds_table(results["starting"][0]),
        forms=forms_table(results["tried"][0]["forms"]),
    )


def ratios(times: Mapping[str, Sequence[float]], row: str, over: str) -> list[float]:
    """Repetition by repetition."""
    return [one / other for one, other in zip(times[row], times[over], strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """ "1.10 (1.08 to 1.13)": the median and the quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{median(values):{form}} ({low:{form}} to {high:{form}})"


def setting(part: Part) -> str:
    return f"{'NF4' if part['bits'] == 4 else 'dense'}, {part['dtype']}"


def step_tables(parts: Sequence[Part], key: str) -> str:
    head = ["base", "hidden", "tokens", "frozen, ms", LORA, PEFT_LORA, DORA, PEFT_DORA, f"{PEFT_DORA} / {DORA}"]
    lines = [
        [
            setting(part),
            f"{part['hidden']}",
            f"{part['tokens']}",
            f"{1e3 * median(part[key][FROZEN]):.0f}",
            *(spread(ratios(part[key], row, FROZEN)) for row in (LORA, PEFT_LORA, DORA, PEFT_DORA)),
            spread(ratios(part[key], PEFT_DORA, DORA)),
        ]
        for part in parts
    ]
    return table(head, lines)


def memory_table(parts: Sequence[Part]) -> str:
    found = peaks(parts)
    lines = [
        [f"{hidden}", f"{tokens}", *(f"{own[row] / 1e6:.0f}" for row in own), f"{own[DORA] / own[LORA]:.2f}"]
        for (hidden, tokens), own in found.items()
    ]
    return table(["hidden", "tokens", *next(iter(found.values())), f"{DORA} / {LORA}"], lines)


def peaks(parts: Sequence[Part]) -> dict[tuple[int, int], dict[str, int]]:
    found: dict[tuple[int, int], dict[str, int]] = {}
    for part in parts:
        found.setdefault((part["hidden"], part["tokens"]), {})[part["row"]] = part["peak"]
    return found


def batch_table(part: Part) -> str:
    times = part["times"]
    counts = [name.removeprefix("per_sample, ") for name in times if name.startswith("per_sample, ")]
    lines = [["one for all, active", spread(ratios(times, "one adapter, active", "frozen")), ""]]
    lines += [[count, *(spread(ratios(times, f"{who}, {count}", "frozen")) for who in ("per_sample", "PEFT"))] for count in counts]
    return table(["different adapters", "torchgraft", "PEFT"], lines)


def seconds_table(times: Mapping[str, Sequence[float]]) -> str:
    return table(["", "seconds"], [[name, spread(values, ".3f")] for name, values in times.items()])


def forms_table(parts: Sequence[Part]) -> str:
    names = [name for name in parts[0]["times"] if name != "frozen"]
    sizes = ("in", "out", "tokens")
    lines = [[*(f"{part[size]}" for size in sizes), *(spread(ratios(part["times"], name, "frozen")) for name in names)] for part in parts]
    return table([*sizes, *names], lines)


def targets(results: Results) -> Iterator[tuple[str, str, bool]]:
    """Text, figure, met: over all shapes, the worst of their medians counts."""
    dense = [part for part in results["steps"] if part["bits"] == 32]
    quantized = [part for part in results["steps"] if part["bits"] == 4]
    yield worst("A step with LoRA takes at most 1.10 × the frozen model's", dense, "step", LORA, FROZEN, 1.10)
    yield worst("… and no longer than with PEFT's", dense, "step", LORA, PEFT_LORA, 1.0)
    yield worst("A forward with LoRA takes at most 1.06 × the frozen model's", dense, "forward", LORA, FROZEN, 1.06)
    yield worst("A step with DoRA takes at most 1.20 × the frozen model's", dense, "step", DORA, FROZEN, 1.20)
    yield worst("… and at most 1 / 1.7 of the time with PEFT's", dense, "step", DORA, PEFT_DORA, 1 / 1.7)
    shares = [own[DORA] / own[LORA] for own in peaks(results["memory"]).values()]
    yield "DoRA's step has at most 5 % more in memory than LoRA's", f"{min(shares):.2f} to {max(shares):.2f} ×", max(shares) <= 1.05
    yield worst("On NF4, a step with QLoRA takes at most 1.05 × the frozen model's", quantized, "step", LORA, FROZEN, 1.05)
    yield worst("On NF4, a step with DoRA takes at most 1 / 1.5 of the time with PEFT's", quantized, "step", DORA, PEFT_DORA, 1 / 1.5)
    decisions = results["allocation"][0]
    _, share, _ = decisions["budget"]["interval"]["ratio"]
    yield "AdaLoRA's budget, decisions included, takes no longer than PEFT's `update_and_allocate`", f"{share:.2f} ×", share <= 1
    _, share, _ = decisions["energy"]["share"]["changed"]
    yield "AdaLoRA's energy takes at most 1 % of the steps between two decisions", f"{share:.2%}", share <= 0.01
    start = results["starting"][0]
    for command, limit in (("adapt --help", 0.15), ("adapt inspect", 0.35)):
        over = median(start[command]) - (median(start["python -c pass"]) if command == "adapt --help" else 0)
        text = f"`{command}` takes at most {limit} s" + (
            " more than `python -c pass`" if command == "adapt --help" else ", on 5 files with 1.1B"
        )
        yield text, f"{over:.3f} s", over <= limit
    own = results["attaching"][0]
    share = median(ratios(own, "torchgraft", "PEFT"))
    seconds = median(own["torchgraft"])
    yield (
        f"LoRA is attached to {own['sites']} layers without values in 1 s, and faster than PEFT's",
        f"{seconds:.2f} s, {share:.2f} × PEFT's",
        seconds <= 1 and share < 1,
    )


def worst(text: str, parts: Sequence[Part], key: str, row: str, over: str, limit: float) -> tuple[str, str, bool]:
    found = [median(ratios(part[key], row, over)) for part in parts]
    return text, f"{min(found):.2f} to {max(found):.2f} ×", max(found) <= limit


PAGE = """\
<!-- written by make bench from results.json -->
# Speed

Ratios are taken within each repetition of one run, in which all rows take turns in a shuffled order; the figures are medians, with
the quartiles in brackets. Targets are held against the worst shape.

Measured on {machine}: {versions}.

{targets}

## A training step

Forward and backward of a Llama-shaped model (2 blocks at hidden size 768, 1 at 1536), rank 16 on all seven linear layers of each
block, gradients of the activations down to the embeddings. Times are relative to the frozen model's. The second column of the base
is the type of products and of the adapters; bfloat16 is measured where the CPU has products in it.

{steps}

## A forward in eval

The second one after the adapters have changed: what a method keeps between calls is there.

{forwards}

## Memory of a step

MB, the weights included, the libraries not; each row in a process of its own; dense, float32.

{memory}

DoRA's magnitude needs the layer's output, or a third product with the weight, for its gradient. torchgraft keeps one output for each
layer, in the type of the layer, and nothing else that LoRA does not keep.

## Several adapters in one batch

A forward of 16 samples of 32 tokens, hidden size 768, 2 layers, with `tg.per_sample` and with PEFT's `adapter_names`; relative to the
model without adapters.

{batches}

## AdaLoRA's decisions

On one thread, with 28 layers, hidden size 768, rank 12 to 8.

{allocation}

## Attaching

LoRA on a model of the shape of Llama 3 70B on the meta device, {sites} layers.

{attaching}

## Starting

{starting}

## Tried, and left out

A step of one layer, relative to that of the layer alone, on memory that is warm. *Products* are the six that LoRA takes beside the
layer's two, alone: nothing that is built on them gets below 1 and their share. *In place* and *gain multiplied* are what torchgraft does
for LoRA and for DoRA, whose norm is left out here: a product that adds to the layer's output, and one multiplication. An
`autograd.Function` for layer and update together saves a pass in backward and costs Python in both; it would have to know how each kind
of layer computes. *Contiguous* lays out the factors as the products read them fastest.

{forms}
"""
