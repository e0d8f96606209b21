"""The docs say what is so: their code runs and prints what they show, and what is generated is up to date."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import click
import pytest

import torchgraft as tg
from docs_blocks import blocks_of, matches, run_page
from references import UNTRIED
from torchgraft.plugin import hookspecs
from torchgraft_cli.main import adapt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in ("benchmarks", "examples", "_build"))
BY_NAME = {page.relative_to(DOCS).as_posix(): page for page in PAGES}
SIGNATURES = ("api.md", "hooks.md")
WITH_CODE = [
    name
    for name, page in BY_NAME.items()
    if name not in SIGNATURES and any(block.language in ("python", "console") for block in blocks_of(page))
]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs_and_prints_what_is_shown(name: str) -> None:
    if UNTRIED and name == "plugins.md":
        pytest.skip("it shows a report of the conformance kit, and the installed torch is too old for some checks")
    run_page(BY_NAME[name])


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    python = [block.text for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    assert python
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"```python\n{text}```" for text in python))
    run_page(page)


def test_what_is_not_run_is_counted() -> None:
    marks = [block.mark for page in PAGES for block in blocks_of(page) if block.mark]
    assert marks == ["not run: it installs a package"] * 2


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("a\nb", "a\n", False),
        ("loss ... at 3", "loss 0.25 at 3\n", True),
        ("loss ... at 3", "loss 0.25 at 4\n", False),
        ("a\n...\nz", "a\nb\nc\nz\n", True),
        ("a\n...\nz", "a\nb\n", False),
        ("", "a\n", False),
    ],
)
def test_shown_and_printed(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) is same


def test_a_page_whose_output_differs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:1: the page shows\n2"):
        run_page(page)
    page.write_text("```console\n$ adapt plugins show lora\nnothing\n```\n")
    with pytest.raises(AssertionError, match="adapt plugins show lora: the page shows\nnothing"):
        run_page(page)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        return import_module("reference")
    finally:
        sys.path.remove(str(DOCS))


def test_generated_pages_are_up_to_date(reference: ModuleType) -> None:
    stale = [name for name, text in reference.pages().items() if (DOCS / name).read_text() != text]
    assert not stale, f"run make reference, for {', '.join(stale)}"


def test_every_hook_stands_in_the_docs_with_its_signature() -> None:
    page = (DOCS / "hooks.md").read_text()
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, "torchgraft_spec")]
    assert len(hooks) >= 14
    for name in hooks:
        section = page.partition(f"\n### {name}\n")[2].partition("\n#")[0]
        arguments = getattr(hookspecs, name).__annotations__.keys() - {"return"}
        assert section, f"{name} is missing"
        assert all(re.search(rf"\b{argument}: ", section) for argument in arguments)


def test_every_command_stands_in_the_docs() -> None:
    page = (DOCS / "cli.md").read_text()

    def paths(path: str, command: click.Command) -> list[str]:
        if not isinstance(command, click.Group):
            return [path]
        context = click.Context(command)
        children = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
        return [path, *(found for name, child in children if child is not None for found in paths(f"{path} {name}", child))]

    expected = paths("adapt", adapt)
    assert {"adapt merge", "adapt plugins show"} <= set(expected)
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == expected


def test_every_public_name_stands_in_the_docs() -> None:
    page = (DOCS / "api.md").read_text()
    assert set(re.findall(r"^### tg\.(\w+)$", page, re.MULTILINE)) == set(tg.__all__) - {"__version__"}


@pytest.mark.parametrize("method", ["lora", "loraplus", "adalora", "qlora", "dora"])
def test_every_option_stands_in_the_page_of_its_method(method: str) -> None:
    page = (DOCS / "methods" / f"{method}.md").read_text()
    for option in tg.registry().method(method).config.model_fields:
        assert f"\n| `{option}` | " in page


def test_links_lead_somewhere() -> None:
    """On GitHub; sphinx checks the site."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    checked = 0
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _without_code(page.read_text())):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", _without_code(path.read_text()), re.MULTILINE)
                assert anchor in {_slug(heading) for heading in headings}, f"{page.name}: {target}"
            checked += 1
    assert checked > 50


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_package_of_the_plugin_guide_names_the_method_that_it_develops() -> None:
    blocks = blocks_of(DOCS / "plugins.md")
    project = tomllib.loads(next(block.text for block in blocks if block.language == "toml"))["project"]
    assert project["entry-points"]["torchgraft"] == {"gain": "torchgraft_gain"}
    assert any('name="gain"' in block.text for block in blocks if block.language == "python")
    assert project["dependencies"] == ["torchgraft>=0.1,<0.2"]
    assert tg.__version__.startswith("0.1.")
