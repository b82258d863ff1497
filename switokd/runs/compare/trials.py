"""What a comparison consists of: trials, each a strategy with a seed and a run folder of its own.

Torch-free.

Not covered: running them (`runner.py`), what came out (`statistics.py`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from switokd.config.config import Config
from switokd.config.run_file import load, load_importable
from switokd.config.yaml_loader import parse_yaml
from switokd.distillation.semantics import problem_of_strategy
from switokd.distillation.strategies import STRATEGIES, make_strategy
from switokd.errors import UsageError
from switokd.runs.compare.statistics import read_summary

OWN_SETTINGS = {
    "seed": "--seeds",
    "run_dir": "--out",
    "distillation.strategy": "--strategies",
    "distillation.strategy_kwargs": "--strategies NAME:KEY=VALUE",
}
"""Settings that a comparison makes itself, and the option that is meant."""


@dataclass(frozen=True)
class Variant:
    """A strategy with its arguments: one column of the table."""

    name: str
    kwargs: Mapping[str, Any]

    @property
    def label(self) -> str:
        """As the command line writes it, such as "threshold:delta=0.5"."""
        arguments = (
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.kwargs.items()
        )
        return ":".join([self.name, *arguments])

    @property
    def settings(self) -> list[str]:
        """What chooses it, each as KEY=VALUE."""
        return [
            f"distillation.strategy={json.dumps(self.name)}",
            f"distillation.strategy_kwargs={json.dumps(self.kwargs)}",
        ]

    def folder(self, out: Path, seed: int) -> Path:
        """Where its run with this seed lies."""
        return out / f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', self.label)}-{seed}"


VANILLA = Variant("vanilla", {})
SWITOKD = Variant("switokd", {})


class TrialState(Enum):
    """What is there of a trial."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    variant: Variant
    seed: int
    config: Config
    arguments: tuple[str, ...]
    """Of `switokd train`."""
    teachers_from: Path | None = None
    """Folder of the run that must be finished first, because it trains the teachers."""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        assert self.config.run_dir is not None, "make_trials sets it"
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        """Such as "dml, seed 0"."""
        return f"{self.variant.label}, seed {self.seed}"

    def state(self) -> TrialState:
        """What its folder holds. UsageError if that is something else than this trial."""
        path = self.folder / "config.yaml"
        try:
            if not self.folder.exists() or not any(self.folder.iterdir()):
                return TrialState.NEW
            if not path.exists():
                raise UsageError(
                    f"{self.folder} holds files, but no run; choose another folder with --out, or "
                    "remove this one"
                )
            if not path.read_text(encoding="utf-8").strip():  # ended while it was written
                return TrialState.UNFINISHED
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UsageError(f"{self.folder} cannot be read: {reason}") from None
        self._check_same(load(str(path)))
        return TrialState.FINISHED if read_summary(self.folder) else TrialState.UNFINISHED

    def _check_same(self, found: Config) -> None:
        """UsageError unless the configurations are equal, but for where the results lie."""
        old, new = (self._comparable(config) for config in (found, self.config))
        different = [key for key in {**new, **old} if old.get(key) != new.get(key)]
        if different:
            key, more = different[0], len(different) - 1
            raise UsageError(
                f"{self.folder} holds a run with {key} {json.dumps(old.get(key))}, and this "
                f"comparison has {json.dumps(new.get(key))}{f' (and {more} more)' * (more > 0)}; "
                "choose another folder with --out, or remove that one"
            )

    def _comparable(self, config: Config) -> dict[str, Any]:
        found = config.must_agree()  # not where folders, data and modules lie
        if self.teachers_from is not None:  # the whole comparison may have been moved
            for key, value in found.items():
                if re.fullmatch(r"networks\.[^.]+\.weights", key) and value is not None:
                    found[key] = Path(value).parts[-3:]
        return found


def parse_strategies(text: str) -> list[Variant]:
    """Strategies as --strategies names them: "dml,threshold:delta=0.5,mine:Own:rate=2".

    After the name, or package.module:callable, each argument is `:KEY=VALUE`, the value in YAML.
    Commas and colons within brackets or braces belong to a value. UsageError for anything else.
    """
    variants = [_parse_strategy(piece.strip()) for piece in _split(text, ",")]
    folders = Counter(v.folder(Path(), 0) for v in variants)
    for variant in variants:
        if folders[variant.folder(Path(), 0)] > 1:
            raise UsageError(f"--strategies {text}: {variant.label} is there twice")
    return variants


def _parse_strategy(text: str) -> Variant:
    name, *rest = _split(text, ":")
    if rest and "=" not in rest[0]:
        name = f"{name}:{rest.pop(0)}"
    kwargs: dict[str, Any] = {}
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not equals or not key.isidentifier() or key in kwargs:
            raise UsageError(
                f"--strategies {text}: found {argument!r}; allowed: NAME or "
                "package.module:callable, then each argument once, as :KEY=VALUE"
            )
        kwargs[key] = parse_yaml(value, f"--strategies {text}")
    return Variant(name, kwargs)


def _split(text: str, separator: str) -> list[str]:
    """Split at the separators that are not within brackets or braces."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def parse_seeds(text: str) -> list[int]:
    """Seeds as --seeds names them: "3" for 0, 1 and 2; "0,1,5" for these; "5," for 5 alone."""
    words = text.removesuffix(",").split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", word) for word in words) or text == "0":
        raise UsageError(
            f"--seeds {text}: a number of seeds, like 3 (for 0, 1 and 2), or seeds with commas, "
            "like 0,1,5"
        )
    seeds = [int(word) for word in words]
    if "," not in text:
        return list(range(seeds[0]))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: a seed is there twice")
    return seeds


def base_config(recipe: str, settings: Sequence[str]) -> Config:
    """The recipe with the settings, and with switokd in place of a strategy of its own.

    UsageError if a setting is one that a comparison makes itself, or the run file is wrong.
    """
    for setting in settings:
        key = setting.partition("=")[0]
        for own, option in OWN_SETTINGS.items():
            if key == own or key.startswith(f"{own}."):
                raise UsageError(f"{setting}: a comparison sets {own} itself; use {option}")
    return load_importable(recipe, [*settings, *SWITOKD.settings])


def make_trials(
    recipe: str,
    settings: Sequence[str],
    variants: Sequence[Variant],
    seeds: Iterable[int],
    out: Path,
) -> list[Trial]:
    """Every strategy with every seed, seed by seed; vanilla as well where another needs it.

    A strategy with frozen teachers (kd) takes those that the run file names no weights for from
    the same seed's vanilla run. Strategies that do not switch go without published semantics.
    UsageError if a strategy or a setting is wrong.
    """
    base = base_config(recipe, settings)
    untrained = [name for name in base.topology.teachers if base.networks[name].weights is None]
    made = {v.label: make_strategy(v.name, v.kwargs) for v in [VANILLA, *variants]}
    frozen = [v.label for v in variants if made[v.label].frozen_teachers and untrained]
    if frozen and VANILLA not in variants:
        variants = [VANILLA, *variants]
    trials = []
    for seed in seeds:
        source = VANILLA.folder(out, seed)
        for variant in variants:
            own = [*variant.settings, f"seed={seed}"]
            own.append(f"run_dir={json.dumps(str(variant.folder(out, seed)))}")
            if problem_of_strategy(base.distillation.semantics, made[variant.label]):
                own.append("distillation.semantics=paper")
            needs = source if variant.label in frozen else None
            if needs is not None:
                for name in untrained:
                    weights = json.dumps(str(needs / "weights" / f"{name}.pt"))
                    own.append(f"networks.{name}.weights={weights}")
            config = load(recipe, [*settings, *own])
            trials.append(Trial(variant, seed, config, (recipe, *settings, *own), needs))
    return trials


def find(out: Path) -> tuple[list[Variant], list[int]]:
    """Strategies and seeds of the runs that lie in a comparison's folder."""
    variants: dict[str, Variant] = {}
    seeds = set()
    for path in sorted(out.glob("*/config.yaml")):
        if read_summary(path.parent) is None:
            continue
        config = load(str(path))
        variant = Variant(config.distillation.strategy, config.distillation.strategy_kwargs)
        if variant.folder(out, config.seed) == path.parent:  # not a copy under another name
            variants[variant.label] = variant
            seeds.add(config.seed)
    if not variants:
        raise UsageError(f"{out} holds no finished run of a comparison")
    order = [*(name for name in STRATEGIES if name != "switokd"), "switokd"]  # as in the paper
    found = sorted(
        variants.values(),
        key=lambda v: (order.index(v.name) if v.name in order else len(order), v.label),
    )
    return found, sorted(seeds)
