"""Tests of the pages under ``docs/``: the table matches METHODS, every class has a page, and the examples run."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import gradkern as gk
from gradkern.aggregators.methods import METHODS
from tests.method_table import PAGE, START, table

DOCS = PAGE.parent
CLASSES = {method.aggregator.__name__: method.aggregator for method in METHODS.values()}
each_class = pytest.mark.parametrize("name", CLASSES)


def page(name: str) -> str:
    return (DOCS / "methods" / f"{name.lower()}.md").read_text()


def test_the_table_is_that_of_the_rows() -> None:
    assert PAGE.read_text().partition(START)[2] == table()


def test_every_page_is_of_a_class() -> None:
    assert {path.stem for path in (DOCS / "methods").iterdir()} == {name.lower() for name in CLASSES}


@each_class
def test_a_page_has_its_parts(name: str) -> None:
    text = page(name)
    arguments = [p.replace(annotation=p.empty) for p in inspect.signature(CLASSES[name]).parameters.values()]
    assert text.startswith(f"# {name}\n\n`gradkern.{name}{inspect.Signature(arguments)}`\n\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["When to use it", "Arguments", "Example", "Source"]
    for argument in inspect.signature(CLASSES[name]).parameters:
        assert f"- `{argument}" in text, argument
    for method in METHODS.values():
        if method.aggregator is CLASSES[name]:
            assert method.paper.title in " ".join(text.split())


@each_class
def test_an_example_runs(name: str) -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    assert blocks
    names = {"gk": gk, "torch": torch}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert link.startswith("https://") or (path.parent / link).is_file(), link
