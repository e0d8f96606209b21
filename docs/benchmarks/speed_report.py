"""Write the page of the speed benchmark from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        summary=summary_table(results),
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


def summary_table(results: Results) -> str:
    """Return the main ratios; a range covers the medians of all measured shapes."""
    dense = [part for part in results["steps"] if part["bits"] == 32]
    quantized = [part for part in results["steps"] if part["bits"] == 4]
    shares = [own[DORA] / own[LORA] for own in peaks(results["memory"]).values()]
    attached = results["attaching"][0]
    rows = [
        ("LoRA, training step", over(dense, "step", LORA, FROZEN), over(dense, "step", LORA, PEFT_LORA)),
        ("LoRA, forward in eval", over(dense, "forward", LORA, FROZEN), over(dense, "forward", LORA, PEFT_LORA)),
        ("DoRA, training step", over(dense, "step", DORA, FROZEN), over(dense, "step", DORA, PEFT_DORA)),
        ("DoRA, forward in eval", over(dense, "forward", DORA, FROZEN), over(dense, "forward", DORA, PEFT_DORA)),
        ("QLoRA on NF4, training step", over(quantized, "step", LORA, FROZEN), over(quantized, "step", LORA, PEFT_LORA)),
        ("DoRA on NF4, training step", over(quantized, "step", DORA, FROZEN), over(quantized, "step", DORA, PEFT_DORA)),
        ("AdaLoRA (budget), rank allocation", "", f"{results['allocation'][0]['budget']['interval']['ratio'][1]:.2f}"),
        (f"attaching LoRA to {attached['sites']} layers", "", f"{median(ratios(attached, 'torchgraft', 'PEFT')):.2f}"),
    ]
    lines = [[text, frozen, peft] for text, frozen, peft in rows]
    memory = f"DoRA's training step takes {min(shares):.2f} to {max(shares):.2f} times the memory of LoRA's."
    return f"{table(['', 'time / frozen model', 'time / PEFT'], lines)}\n\n{memory}"


def over(parts: Sequence[Part], key: str, row: str, base: str) -> str:
    """Format the range of the medians over all shapes: "1.03 to 1.12"."""
    found = [median(ratios(part[key], row, base)) for part in parts]
    return f"{min(found):.2f} to {max(found):.2f}"


def ratios(times: Mapping[str, Sequence[float]], row: str, over: str) -> list[float]:
    """Return the ratio of the two times in each repetition."""
    return [one / other for one, other in zip(times[row], times[over], strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Format the median with the quartiles: "1.10 (1.08 to 1.13)"."""
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


PAGE = """\
<!-- written by make bench from results.json -->
# Speed: training, batches, attaching, start-up

torchgraft compared with PEFT and with the frozen model without adapters: training steps, forwards, memory, several adapters in one
batch, AdaLoRA's rank allocation, attaching, and the start-up of the command.

Machine: {machine}.
Versions: {versions}.

{summary}

A ratio below 1 means that torchgraft is faster. Ratios are taken within each repetition of one run, in which all rows take turns in a
shuffled order. Figures below are medians with quartiles in brackets; the ranges above cover the medians of all shapes.

## Training step

Forward and backward of a Llama-shaped model (2 blocks at hidden size 768, 1 at 1536) with rank 16 on all seven linear layers of each
block; gradients flow down to the embeddings. Times are relative to the frozen model's. The dtype is that of the matrix products and of
the adapters; bfloat16 is measured only on CPUs with native bfloat16 products.

{steps}

## Forward in eval mode

The second forward after the adapters have changed, when values that a method caches are available.

{forwards}

## Memory of a training step

MB, weights included, libraries excluded; each row in a process of its own; dense, float32.

{memory}

The gradient of DoRA's magnitude needs the layer's output or a third product with the weight. torchgraft stores one output for each layer,
in the layer's dtype, and otherwise only what LoRA stores.

## Several adapters in one batch

A forward of 16 samples of 32 tokens, hidden size 768, 2 layers, with `tg.per_sample` and with PEFT's `adapter_names`, relative to the
model without adapters.

{batches}

## AdaLoRA's rank allocation

On one thread, with 28 layers, hidden size 768, from rank 12 to 8. PEFT's is `update_and_allocate`.

{allocation}

## Attaching

LoRA on a model of the shape of Llama 3 70B on the meta device, {sites} layers.

{attaching}

## Start-up

`adapt inspect` reads a checkpoint of 1.1B parameters in 5 files. `python -c pass` is the baseline.

{starting}

## Alternatives that were measured and not used

A training step of one layer, relative to that of the layer alone. *Products* is the time of LoRA's six matrix products alone, a lower
bound for what LoRA adds. *In place* and *gain multiplied* are the implementations in use for LoRA and for DoRA (without its norm): the
update is added to the layer's output in place, and multiplied by the gain. An `autograd.Function` for layer and update together saves one
addition in backward, costs Python overhead in both directions, and would have to know how each kind of layer computes. *Contiguous* lays
out the factors as the products read them fastest.

{forms}
"""
