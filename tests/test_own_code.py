"""Errors of the user's own code: told apart from switokd's own, and described in one line.

Not covered: runs that such an error ends (`tests/training/test_own_code_runs.py`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from switokd import errors
from switokd.config.data_section import Data
from switokd.data.named import open_sources
from switokd.distillation.strategies import make_strategy
from switokd.errors import OwnCodeError, UsageError, own_code_errors, summary
from switokd.models.registry import build
from switokd.plugins import import_callable
from switokd.runtime.lifecycle import VERBOSE, Terminated, told, unwind_on_sigterm
from switokd.training import learner

OWN = """\
import switokd.distillation.strategies
import torch

def fails(error):
    raise error

def uses_torch():
    return torch.ones(2) @ torch.ones(3)

def calls(function):
    return function()

def endless():
    return endless()

def leaves():
    exit()

class Net(torch.nn.Linear):
    def __init__(self, sizes):
        super().__init__(sizes.pop(), 2)

class Items(list):
    def __init__(self, train, names):
        super().__init__([(torch.zeros(3, 8, 8), 0)])
        names.append("one more")
        self.classes = names

class Rule(switokd.distillation.strategies.Strategy):
    def __init__(self, deltas):
        self.first = deltas.pop(0)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's module of a name that is imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    monkeypatch.setattr(errors, "own_packages", set())
    (tmp_path / "own_code.py").write_text(OWN)
    return tmp_path


def raised(name: str, *arguments: object) -> OwnCodeError:
    function: Callable[..., object] = import_callable(f"own_code:{name}", "model")
    with pytest.raises(OwnCodeError) as found, own_code_errors("network s"):
        function(*arguments)
    assert "\n" not in str(found.value)
    assert found.value.exit_code == 2
    return found.value


class Silent(Exception):
    def __str__(self) -> str:
        raise TypeError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError(), "ValueError"),
        (ValueError("\n\n  first \n second"), "ValueError: first"),
        (RuntimeError("Missing:\n\ta\n\tb"), "RuntimeError: Missing: a"),
        (ValueError("x" * 1000), f"ValueError: {'x' * 300}..."),
        (KeyError("name"), "KeyError: 'name'"),
        (AssertionError(), "AssertionError"),
        (Silent(), "Silent"),
        (SystemExit(0), "SystemExit: it ends the process, with 0"),
        (MemoryError(), "MemoryError"),
        (OSError("no image in <_io.BufferedReader name='a.png'>"), "OSError: no image in 'a.png'"),
        (BaseException("base"), "BaseException: base"),
    ],
)
def test_an_error_is_one_line_with_its_place(error: BaseException, words: str, own: Path) -> None:
    found = raised("fails", error)
    assert str(found) == f"own_code.py:5 in fails (network s): {words} (`raise error`)"
    assert found.__cause__ is error


def test_the_place_is_the_users_even_if_a_library_raises(own: Path) -> None:
    assert "own_code.py:8 in uses_torch (network s): RuntimeError: " in str(raised("uses_torch"))
    assert "own_code.py:14 in endless (network s): RecursionError: " in str(raised("endless"))
    assert "own_code.py:17 in leaves (network s): SystemExit: it ends" in str(raised("leaves"))


def test_a_module_that_is_installed_counts_as_the_users_once_named(own: Path) -> None:
    folder = own / "site-packages"
    folder.mkdir()
    (own / "own_code.py").rename(folder / "own_code.py")
    sys.path.append(str(folder))
    try:
        assert "site-packages/own_code.py:5 in fails" in str(raised("fails", ValueError()))
    finally:
        sys.path.remove(str(folder))


def test_a_file_outside_the_current_folder_has_its_whole_path(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    assert f"{own}/own_code.py:5 in fails" in str(raised("fails", ValueError()))


class OutOfMemoryError(RuntimeError):
    """Stands for PyTorch's, which is told with advice of its own."""


@pytest.mark.parametrize(
    "error", [UsageError("mine"), KeyboardInterrupt(), OutOfMemoryError("CUDA out of memory")]
)
def test_what_has_a_message_of_its_own_passes(error: BaseException, own: Path) -> None:
    function = import_callable("own_code:fails", "model")
    with pytest.raises(type(error)) as found, own_code_errors("network s"):
        function(error)
    assert found.value is error


def test_a_fault_of_switokd_passes(own: Path) -> None:
    """Also one in code that the user's code calls."""
    calls = import_callable("own_code:calls", "model")

    def fault() -> None:
        errors.nearest("word", 4)  # type: ignore[arg-type]

    for start in (fault, lambda: calls(fault)):
        with pytest.raises(TypeError), own_code_errors("network s", __file__):
            start()


def test_a_librarys_error_belongs_to_the_network_only_where_it_was_called(own: Path) -> None:
    for door, kind in ((learner.__file__, OwnCodeError), ("", RuntimeError)):
        with pytest.raises(kind), own_code_errors("network s", door):
            learner.ForwardPass(torch.nn.Linear(3, 2))(torch.rand(2, 4))


def test_sigterm_in_the_users_code_is_no_error_of_it(own: Path) -> None:
    calls = import_callable("own_code:calls", "model")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    unwind_on_sigterm()
    try:
        with pytest.raises(Terminated), own_code_errors("network s", __file__):
            calls(lambda: signal.raise_signal(signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (", "broken.py:1 (model broken:net): SyntaxError: "),
        ("if 1:\npass", "broken.py:2 (model broken:net): IndentationError: "),
        ("import absent_thing", "broken.py:1 (model broken:net): ModuleNotFoundError: "),
        ("from os import absent", "broken.py:1 (model broken:net): ImportError: "),
        ("\n1 / 0", "broken.py:2 (model broken:net): ZeroDivisionError: "),
        ("raise SystemExit", "broken.py:1 (model broken:net): SystemExit: "),
        ("def f():\n  g\nf()", "broken.py:2 in f (model broken:net): NameError: "),
        ("x = 1\0", ""),
    ],
)
def test_a_module_that_cannot_be_imported(text: str, words: str, own: Path) -> None:
    (own / "broken.py").write_text(text)
    with pytest.raises(OwnCodeError) as found:
        import_callable("broken:net", "model")
    assert str(found.value).startswith(words)
    assert found.value.seen_by_every_rank  # all ranks import it


def test_a_broken_module_that_the_users_module_imports(own: Path) -> None:
    (own / "broken.py").write_text("import helper_of_broken")
    (own / "helper_of_broken.py").write_text("x =")
    with pytest.raises(
        OwnCodeError, match=r"^helper_of_broken\.py:1 \(model broken:net\): SyntaxErr"
    ):
        import_callable("broken:net", "model")


def test_verbose_shows_the_frames_of_the_users_error(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = raised("fails", ValueError("no"))
    monkeypatch.delenv(VERBOSE, raising=False)
    assert told(found) == f"{found}; --verbose shows the frames"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(VERBOSE, "1")
    assert told(found) == str(found)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert 'own_code.py", line 5, in fails\n    raise error\n' in shown
    assert shown.endswith("ValueError: no\n")
    assert summary(ValueError("no")) == "ValueError: no"


def test_what_own_code_changes_in_its_arguments_stays_with_it(own: Path) -> None:
    """The run file's lists are used again: for the other data set, and by an export."""
    sizes, names, deltas = [5, 192], ["a", "b"], [1.0, 2.0]
    for _ in range(2):
        assert build("own_code:Net", 3, 2, {"sizes": sizes}).in_features == 192
        sources = open_sources(Data(dataset="own_code:Items", kwargs={"names": names}))
        assert sources.classes == len(sources.test.items.classes) == 3  # type: ignore[attr-defined]
        assert make_strategy("own_code:Rule", {"deltas": deltas}).first == 1.0  # type: ignore[attr-defined]
    assert (sizes, names, deltas) == ([5, 192], ["a", "b"], [1.0, 2.0])
