"""Every block of code of the documents is run, or says why not and is checked.

Not covered: what the tutorial's blocks print (`test_tutorial.py`).
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from switokd.config.config import known_settings
from switokd.config.recipes import recipes
from switokd.distillation.strategies import STRATEGIES
from tests.docs.blocks import (
    CODE,
    DOCUMENTS,
    Block,
    blocks,
    problems_of,
    run_file_with_settings,
    session,
    with_settings,
)
from tests.support import REPOSITORY, lines

OWN_TESTS = ("docs/tutorial.md", "docs/python.md")
"""Documents whose blocks `test_tutorial.py` runs, because it also looks at what they leave."""

ON_MACHINES = ("docs/how-to/several-nodes.md",)
"""Documents with blocks for several machines, which `test_several_nodes.py` runs."""


def name_of(document: Path) -> str:
    return str(document.relative_to(REPOSITORY))


EXECUTED = [
    document
    for document in DOCUMENTS
    if name_of(document) not in OWN_TESTS and any(block.is_run for block in blocks(document))
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_is_run_or_says_why_not(document: Path) -> None:
    text = document.read_text()
    found = list(blocks(document))
    assert len(found) * 2 == len(re.findall("^ *```", text, re.MULTILINE)), "a fence is not closed"
    for block in found:
        if "on" in block.markers:
            assert name_of(document) in ON_MACHINES
        elif block.language in CODE and not block.is_run:
            assert len(block.markers["not run"].split()) >= 3, "a reason is a sentence"
        assert not problems_of(block), f"{document}:{block.line}"
    if any(block.is_run for block in found) and name_of(document) not in OWN_TESTS:
        assert document in EXECUTED


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", EXECUTED, ids=name_of)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    session(document, tmp_path)
    for summary in (tmp_path / "work").glob("runs/*/summary.json"):
        assert json.loads(summary.read_text())["networks"], "a run without networks"
        assert lines(summary.parent / "metrics.jsonl")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("switokd trian digits-1t1s", "no command trian"),
        ("switokd train digits-9t9s", "no recipe digits-9t9s"),
        ("switokd train digits-1t1s schedule.epoch=3", "no setting schedule.epoch"),
        ("switokd train digits-1t1s schedule.epochs=0", "schedule.epochs"),
        ("switokd compare digits-1t1s --seed 3", "--seed"),
        ("torchrun --nproc-per-node=3 -m switokd.trains digits-2t1s", "no module switokd.trains"),
        ("torchrun --procs=3 -m switokd.train digits-2t1s", "torchrun refuses"),
        ("make tests", "no target tests"),
        ("pip install 'switokd[exports]'", "no extra exports"),
        ("kubectl apply -k k8s/bases", "k8s/bases is not in the repository"),
        ("kubectl apply -k deploy", "deploy: no kustomization"),
        ("echo all is well", "does not know how to check it"),
        ("cd docs && .venv/bin/mypi", "mypi is not installed"),
    ],
)
def test_a_mistake_in_a_command_that_is_not_run_is_found(code: str, problem: str) -> None:
    assert problem in "\n".join(problems_of(Block("sh", 1, code, {"not run": "a reason here"})))


def test_a_mistake_in_settings_is_found() -> None:
    (problem,) = problems_of(Block("yaml", 1, "schedule: {epoch: 3}", {}))
    assert "unknown key schedule.epoch" in problem


@pytest.mark.parametrize(
    ("code", "executed"),
    [
        ("switokd train a b=1  # why\n", "switokd train a b=1 x=2 # why\n"),
        ("torchrun --nnodes=1 \\\n  -m switokd.train a\n", "torchrun --nnodes=1    -m"),
        ("switokd export runs/a\n", "switokd export runs/a\n"),
        ("switokd train a &\n", "switokd train a x=2 &\n"),
    ],
)
def test_settings_go_behind_the_arguments_of_training_commands(code: str, executed: str) -> None:
    assert executed in with_settings(code, "x=2")


def test_settings_are_added_to_a_run_file() -> None:
    text = run_file_with_settings("# a.yaml\ndata: {dataset: digits}\n", "data.seed=3 schedule.a=b")
    assert text.startswith("# a.yaml\n")
    assert yaml.safe_load(text) == {
        "data": {"dataset": "digits", "seed": 3},
        "schedule": {"a": "b"},
    }


@pytest.mark.parametrize("marker", ["<!-- norun: why -->", "<!-- run with x -->"])
def test_an_unknown_marker_is_found(marker: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"{marker}\n\n```sh\nmake demo\n```\n")
    with pytest.raises(ValueError, match="marker"):
        list(blocks(tmp_path / "page.md"))


def test_the_readme_fits_on_150_lines_and_lists_what_there_is() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for heading, names in (
        ("| recipe |", recipes()),
        ("| `distillation.strategy` |", [*STRATEGIES, "package.module:callable"]),
    ):
        table = readme.partition(heading)[2].partition("\n\n")[0].splitlines()[2:]
        listed = [name for row in table for name in re.findall("`(.+?)`", row.split(" | ")[0])]
        assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    """`make docs` checks links within docs/; here are those of the other documents as well."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no such file"
        if anchor and target.suffix == ".md" and "reference" not in target.parts:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{link}: there is no such heading"


# The pages of results are records of their day.
CURRENT = [document for document in DOCUMENTS if "results" not in document.parts]


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_names_in_the_text_exist(document: Path) -> None:
    """Paths of the repository and dotted names of the package, where the text names them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    quoted = set(re.findall(r"`([^`\n]+)`", text))
    folders = "bench|deploy|docs|k8s|proto|services|switokd|tests"
    for path in (q for q in quoted if re.fullmatch(rf"(?:{folders})/[\w./-]*", q)):
        assert (REPOSITORY / path).exists() or path == "bench/results.json", path
    for name in quoted:
        if match := re.match(r"(switokd(?:\.\w+)+)(?:\(|$)", name):
            assert resolves(match[1]), name
    known = [key for key, _ in known_settings()]
    sections = {key.partition(".")[0] for key in known if "." in key}
    for key in (q.partition("=")[0] for q in quoted):
        is_file = key.endswith((".yaml", ".yml"))
        if re.fullmatch(r"\w+(\.\w+)+", key) and key.partition(".")[0] in sections and not is_file:
            assert is_known(key, known), key


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            thing = getattr(thing, part, None)
        return thing is not None
    return False


def is_known(key: str, known: list[str]) -> bool:
    """Whether a setting exists; names of networks are those of the text."""
    key = re.sub(r"^networks\.\w+", "networks.NAME", key)
    key = re.sub(r"^pairs\.\w+\.\w+", "pairs.TEACHER.STUDENT", key)
    return any(k == key or k.startswith(f"{key}.") for k in known)


def test_the_site_lists_every_page() -> None:
    """`make docs` builds it strictly; pages that are in no menu are found there as well."""
    text = (REPOSITORY / "mkdocs.yml").read_text()
    pages = re.findall(r"[\w./-]+\.md", text)
    docs = REPOSITORY / "docs"
    assert sorted(pages) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
    assert yaml.safe_load(text)["theme"]["font"] is False
