"""The pages of the reference hold what the code has: commands, contract, Python, exit codes.

Not covered: settings (`test_design.py`), limits (`tests/services`), keys of JSON (`tests/cli`).
"""

from __future__ import annotations

import importlib
import re
import sys

import typer

import switokd
from switokd import errors
from switokd.cli.main import app
from switokd.services.coordinator.refusal import Refusal
from switokd.v1 import coordinator_pb2 as pb
from tests.support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs"))
import reference_commands  # type: ignore[import-not-found]
import reference_contract  # type: ignore[import-not-found]

REFERENCE = REPOSITORY / "docs" / "reference"


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def first_column(text: str, heading: str) -> list[str]:
    """The first cells of the table under a heading."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `?(\w+)`? \|", section, re.MULTILINE)[1:]


def test_every_command_is_there_with_all_its_options() -> None:
    shown = reference_commands.on_page_markdown(page("commands.md"))
    assert reference_commands.PLACE not in shown
    sections = dict(re.findall(r"^### switokd (\w+)\n(.*?)(?=^### |\Z)", shown, re.M | re.S))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert list(sections) == list(commands)
    for name, command in commands.items():
        assert f"$ switokd {name}" in sections[name]
        for option in (o for o in command.params if o.param_type_name == "option"):
            if not getattr(option, "hidden", False):
                assert option.opts[-1] in sections[name], f"{name} {option.opts}"
    assert "```console\nswitokd train --resume runs/first schedule.epochs=10\n```" in shown


def test_the_exit_codes_are_those_of_the_code() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.SwitokdError)}
    codes |= {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert first_column(page("commands.md"), "Exit codes") == [str(c) for c in sorted({0, *codes})]


def test_every_message_field_and_call_is_there() -> None:
    shown = reference_contract.on_page_markdown(page("contract.md"))
    assert reference_contract.PLACE not in shown
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", shown, re.M | re.S))
    file = pb.DESCRIPTOR
    parts = [*file.services_by_name, *file.message_types_by_name, *file.enum_types_by_name]
    nested = [name for m in file.message_types_by_name.values() for name in m.enum_types_by_name]
    assert sorted(sections) == sorted(parts)
    for name, message in file.message_types_by_name.items():
        listed = re.findall(r"^\| `(\w+)` \| (\d+) \|", sections[name], re.M)
        expected = [(f.name, str(f.number)) for f in message.fields]
        expected += [(v.name, str(v.number)) for e in message.enum_types for v in e.values]
        assert listed == expected, name
    for name, enum in file.enum_types_by_name.items():
        listed = re.findall(r"^\| `(\w+)` \| (\d+) \|", sections[name], re.M)
        assert listed == [(v.name, str(v.number)) for v in enum.values], name
    (service,) = file.services_by_name.values()
    calls = re.findall(r"^\| `(\w+)` \|", sections["CoordinatorService"], re.M)
    assert calls == [method.name for method in service.methods]
    links = set(re.findall(r"\(#([a-z]+)\)", "".join(sections.values())))
    assert links <= {name.lower() for name in (*parts, *nested)}
    assert "Counted from 1, in order." in sections["Report"]  # a comment of the file
    assert "one of `event`" in sections["TrainRequest"]


def test_the_status_codes_are_those_that_the_coordinator_sends() -> None:
    sources = (REPOSITORY / "services" / "coordinator").glob("*.py")
    sent = set(re.findall(r"StatusCode\.(\w+)", "".join(s.read_text() for s in sources)))
    sent |= {kind.name for kind in Refusal.Kind}
    assert sorted(first_column(page("contract.md"), "Status codes")) == sorted(sent)


def test_the_python_page_has_the_whole_interface() -> None:
    shown = page("python.md")
    listed: dict[str, object] = {}
    for path, heading in re.findall(
        r"^::: ([\w.]+)\n    options:\n      heading: (.+)$", shown, re.M
    ):
        module, _, name = path.rpartition(".")
        listed[heading] = getattr(importlib.import_module(module), name)
    public = [name for name in switokd.__all__ if name != "__version__"]
    assert listed == {f"switokd.{name}": getattr(switokd, name) for name in public}
    for path in re.findall(r"^::: ([\w.]+)$", shown, re.M):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__
