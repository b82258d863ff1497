"""Code blocks of the documents: finding them, running them, checking those that cannot run.

A block is run in the order of its page, in one folder per page that is empty at first. A comment
before the block changes that:

    <!-- not run: REASON -->      the block is only checked (`problems_of`)
    <!-- run with: SETTINGS -->   training commands, or the run file, get these settings as well
    <!-- given: images -->        the folder holds what the reader is said to have (`GIVEN`)
    <!-- given: deploy -->        likewise, a copy of deploy/
    <!-- given: ports -->         the page's commands have a network of their own, with all ports
    <!-- wait for: FILE -->       the block is run once the file has content, which a command
                                  in the background writes
    <!-- on: MACHINE -->          a machine with that name runs it (`machines.py`)

Not covered: what a page says a command prints (`test_tutorial.py` does it for the tutorial).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import typer
import yaml
from PIL import Image

from switokd.cli.main import app
from switokd.config.config import known_settings
from switokd.config.recipes import recipes
from switokd.config.run_file import load
from switokd.errors import SwitokdError
from tests.docs.commands import run_blocks
from tests.preloaded import call
from tests.support import BIN, REPOSITORY, require, unshare

CODE = {"python", "sh", "yaml"}
LANGUAGES = {*CODE, "text"}
"""A block of `text` is no code: output, or a layout of folders."""
MARKERS = ("not run", "run with", "given", "wait for", "on")
PORTS = "ports"
"""What is given to a page whose commands listen on fixed ports."""
FENCE = re.compile(r"((?:^<!-- [^\n]+ -->\n)*)\n?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A block of code, the line it starts on, and the markers before it."""

    language: str
    line: int
    code: str
    markers: dict[str, str]

    @property
    def is_run(self) -> bool:
        """Whether `session` executes the block."""
        return self.language in CODE and not self.markers.keys() & {"not run", "on"}

    @property
    def executed(self) -> str:
        """The code as the test executes it, with the settings of `run with`."""
        settings = self.markers.get("run with", "")
        change = run_file_with_settings if self.language == "yaml" else with_settings
        return change(self.code, settings)


def blocks(document: Path) -> Iterator[Block]:
    """All fenced blocks of a document; ValueError for an unknown marker or language."""
    text = document.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(3))
        comments = re.findall(r"^<!-- ([^:\n]+):? ?(.*) -->$", match[1], re.MULTILINE)
        markers = {key: value for key, value in comments if key in MARKERS and value}
        if len(markers) < len(comments):
            raise ValueError(f"{document}:{line}: a marker is one of {', '.join(MARKERS)}")
        if match[2] not in LANGUAGES:
            raise ValueError(f"{document}:{line}: a block of {match[2] or 'no language'}")
        yield Block(match[2], line, match[3], markers)


def with_settings(code: str, settings: str) -> str:
    """The shell commands of `code` that train, with `settings` behind their arguments."""
    if not settings:
        return code
    command = r"^((?:switokd (?:train|compare)|torchrun|python -m switokd\.train)\b[^#&|\n]*)"
    return re.sub(
        command,
        lambda match: f"{match[1].rstrip()} {settings} ",
        code.replace("\\\n", " "),
        flags=re.MULTILINE,
    )


def run_file_with_settings(text: str, settings: str) -> str:
    """A run file with `settings`, each a section's key; the first line, its name, stays."""
    if not settings:
        return text
    content = yaml.safe_load(text)
    for setting in settings.split():
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = yaml.safe_load(value)
    return f"{text.partition(chr(10))[0]}\n{yaml.safe_dump(content, sort_keys=False)}"


def session(document: Path, folder: Path, seconds: float = 240) -> str:
    """Run a document's blocks in one Python session and shells beside it; what they print."""
    work = folder / "work"
    work.mkdir()
    found = [block for block in blocks(document) if block.is_run]
    given = {name for block in found for name in block.markers.get("given", "").split()}
    for name in sorted(given - {PORTS}):
        GIVEN[name](work)
    if PORTS in given:
        require("ip", "iproute2")
        unshare("-rn")
    for program, package in PACKAGES.items():
        if any(re.search(rf"(^|&& ){program} ", block.code, re.MULTILINE) for block in found):
            require(program, package)
    listed = [(b.language, b.line, b.executed, b.markers.get("wait for", "")) for b in found]
    (folder / "blocks.json").write_text(json.dumps(listed))
    arguments = (folder / "blocks.json", str(document), PORTS in given)
    code, out, err = call(work, run_blocks, *arguments, seconds=seconds)
    assert code == 0, f"{out}\n{err}"
    return out


def _images(folder: Path) -> None:
    """`images/train/CLASS` and `images/val/CLASS`, with six pictures of two classes in each."""
    for part in ("train", "val"):
        for label, grey in (("dark", 20), ("light", 220)):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(6):
                picture = Image.new("RGB", (80 + i, 70), (grey + i,) * 3)
                picture.save(folder / "images" / part / label / f"{i}.jpg")


def _deploy(folder: Path) -> None:
    """The folder deploy/ of the repository, which the reader has cloned."""
    shutil.copytree(REPOSITORY / "deploy", folder / "deploy")


GIVEN: dict[str, Callable[[Path], None]] = {"images": _images, "deploy": _deploy}
PACKAGES = {
    "sqlite3": "sqlite3",
    "promtool": "prometheus",
    "amtool": "prometheus-alertmanager",
}
"""Programs of the pages' commands, with the packages that have them."""


def problems_of(block: Block) -> list[str]:
    """What is wrong with a block, as far as that shows without running it."""
    if block.language == "yaml":
        return _problems_of_settings(block.code)
    if block.language == "python":
        compile(block.code, "block", "exec")
        return []
    if block.language == "sh":
        return [problem for words in commands(block.code) for problem in _problems_of(words)]
    return []


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without comments and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        is_file = False  # the word after ">" or "<"
        for word in [*lexer, ";"]:
            if set(word) <= set("();|&"):
                if words:
                    yield words
                words = []
            elif not is_file and not set(word) <= set("<>"):
                words.append(word)
            is_file = set(word) <= set("<>")


def _problems_of_settings(text: str) -> list[str]:
    """A run file must be valid as it stands, other settings together with the rest of a recipe."""
    keys = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    if not keys & {"networks", "topology"}:
        recipe = load("digits-2t1s").model_dump(mode="json")
        text += "\n" + yaml.safe_dump({key: recipe[key] for key in recipe if key not in keys})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "block.yaml"
        file.write_text(text)
        try:
            load(str(file))
        except SwitokdError as error:
            return [str(error)]
    return []


def _problems_of(words: Sequence[str]) -> list[str]:
    """One command: its program must be known here, and its arguments must exist."""
    program, *arguments = dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)
    problems = [
        f"{path} is not in the repository"
        for word in arguments
        for path in re.findall(r"(?:^|=|/)((?:deploy|k8s|tests|docs|proto)/[\w./-]*)", word)
        if not (REPOSITORY / path).exists()
    ]
    if program.startswith(".venv/bin/"):
        program = program.removeprefix(".venv/bin/")
        if not (BIN / program).exists():
            problems.append(f"{program} is not installed by make dev")
    check = PROGRAMS.get(program)
    if check is None:
        return [*problems, f"{program}: tests/docs/blocks.py does not know how to check it"]
    return problems + check(arguments)


def _switokd(arguments: Sequence[str]) -> list[str]:
    """A subcommand of `switokd` with its options, its recipe and its settings."""
    name, *rest = arguments
    commands = typer.main.get_command(app)
    if name.startswith("-"):
        return [] if any(name in option.opts for option in commands.params) else [f"no {name}"]
    command = commands.commands.get(name)  # type: ignore[attr-defined]
    if command is None:
        return [f"switokd has no command {name}"]
    if hasattr(command, "commands"):  # a group, as k8s
        name, *rest = rest
        if name not in command.commands:
            return [f"switokd has no such command {name}"]
        command = command.commands[name]
    try:
        command.make_context(name, list(rest))
    except Exception as error:  # of the click that typer brings along
        if "does not exist" not in str(error):
            return [f"switokd {name}: {error}"]
    return _recipe(rest) if name in ("train", "compare", "plan", "check", "render") else []


def _recipe(arguments: Sequence[str]) -> list[str]:
    """A recipe and the settings on top of it, among other arguments."""
    known = {key for key, _ in known_settings()}
    settings = [word for word in arguments if re.match(r"[a-z_]+(\.\w+)*=", word)]
    problems = []
    for setting in settings:
        key = re.sub(r"^networks\.\w+", "networks.NAME", setting.partition("=")[0])
        key = re.sub(r"^pairs\.\w+\.\w+", "pairs.TEACHER.STUDENT", key)
        if key not in known:
            problems.append(f"no setting {key}")
    name = arguments[0] if arguments else ""
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name):
        if name not in recipes():
            problems.append(f"no recipe {name}")
        elif not problems:
            try:
                load(name, settings)
            except SwitokdError as error:
                problems.append(str(error))
    return problems


def _torchrun(arguments: Sequence[str]) -> list[str]:
    """Options that torchrun knows, a module that exists, a recipe."""
    from torch.distributed.run import get_args_parser

    values = [re.sub(r"\$\w+", "0", word) for word in arguments]
    try:
        parsed: Any = get_args_parser().parse_args(values)
    except SystemExit:
        return [f"torchrun refuses {' '.join(arguments)}"]
    return _module([parsed.training_script]) + _recipe(parsed.training_script_args)


def _python(arguments: Sequence[str]) -> list[str]:
    """`python -m MODULE`."""
    return _module(arguments[1:2]) if arguments[:1] == ["-m"] else []


def _module(names: Sequence[str]) -> list[str]:
    return [f"no module {name}" for name in names if importlib.util.find_spec(name) is None]


def _make(targets: Sequence[str]) -> list[str]:
    makefile = (REPOSITORY / "Makefile").read_text()
    return [f"no target {t}" for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]


def _pip(arguments: Sequence[str]) -> list[str]:
    """Extras that the package has."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    extras = re.findall(r"(?:switokd|\.)\[(\w+)\]", " ".join(arguments))
    return [f"no extra {e}" for e in extras if not re.search(rf"^{e} = \[", project, re.MULTILINE)]


def _kubectl(arguments: Sequence[str]) -> list[str]:
    """`-k FOLDER` must be one that kustomize can render, or one that the reader has made."""
    folders = [b for a, b in pairwise(arguments) if a == "-k" and (REPOSITORY / b).exists()]
    return [f"{f}: no kustomization" for f in folders if not _is_kustomization(f)]


def _is_kustomization(folder: str) -> bool:
    return (REPOSITORY / folder / "kustomization.yaml").is_file()


ANY_ARGUMENTS = (
    *("apt-get", "cd", "do", "docker", "done", "export", "for", "git", "gunzip", "kill", "mkdir"),
    *("mlflow", "pre-commit", "prometheus", "prometheus-alertmanager", "promtool"),
    *("amtool", "pytest", "sed", "sqlite3", "tail", "tensorboard", "wandb"),
    *("sbatch", "scancel", "squeue", "ssh"),
)
"""Programs of which only the paths among their arguments are checked."""


def _nothing_more(_: Sequence[str]) -> list[str]:
    """Paths of the repository are checked for every program."""
    return []


PROGRAMS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "switokd": _switokd,
    "torchrun": _torchrun,
    "python": _python,
    "make": _make,
    "pip": _pip,
    "kubectl": _kubectl,
    **dict.fromkeys(ANY_ARGUMENTS, _nothing_more),
}
