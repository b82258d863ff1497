"""Trials of a comparison: a trial is one strategy with one seed, and has its own run folder.

Not covered: running the trials (`runner.py`), their results (`statistics.py`).
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
from switokd.config.yaml_loader import in_one_line, parse_yaml
from switokd.distillation.semantics import problem_of_strategy
from switokd.distillation.strategies import STRATEGIES, make_strategy
from switokd.distillation.strategies.base import Strategy
from switokd.errors import Mistakes, UsageError
from switokd.runs.compare.statistics import read_summary

RESERVED_SETTINGS = {
    "seed": "--seeds",
    "run_dir": "--out",
    "distillation.strategy": "--strategies",
    "distillation.strategy_kwargs": "--strategies NAME:KEY=VALUE",
}
"""Settings that a comparison sets itself, with the option to use instead."""


@dataclass(frozen=True)
class Variant:
    """A strategy with its arguments: one column of the comparison's table."""

    name: str
    kwargs: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Text of the command line for this variant, for example "threshold:delta=0.5"."""
        arguments = (
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.kwargs.items()
        )
        return ":".join([self.name, *arguments])

    @property
    def settings(self) -> list[str]:
        """Settings that select this variant, as KEY=VALUE."""
        return [
            f"distillation.strategy={json.dumps(self.name)}",
            f"distillation.strategy_kwargs={in_one_line(dict(self.kwargs))}",
        ]

    def folder(self, out: Path, seed: int) -> Path:
        """Run folder of this variant with this seed."""
        return out / f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', self.label)}-{seed}"


VANILLA = Variant("vanilla", {})
SWITOKD = Variant("switokd", {})


class TrialState(Enum):
    """Progress of a trial, as its run folder shows it."""

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
    """Arguments of `switokd train`."""
    teachers_from: Path | None = None
    """Folder of the run that trains the teachers and must finish first; None if there is none."""

    @property
    def folder(self) -> Path:
        """Run folder of the trial."""
        assert self.config.run_dir is not None, "make_trials sets it"
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        """Name in messages, for example "dml, seed 0"."""
        return f"{self.variant.label}, seed {self.seed}"

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run can be continued."""
        return any(self.folder.glob("checkpoints/step-*"))

    def state(self) -> TrialState:
        """Read the progress from the run folder.

        UsageError if the folder cannot be read, or holds something else than this trial.
        """
        path = self.folder / "config.yaml"
        try:
            if not self.folder.exists() or not any(self.folder.iterdir()):
                return TrialState.NEW
            if not path.exists():
                raise UsageError(
                    f"{self.folder} holds files, but no run; choose another folder with --out, or "
                    "remove this folder"
                )
            if not path.read_text(encoding="utf-8").strip():  # the run ended while writing it
                return TrialState.UNFINISHED
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UsageError(f"{self.folder} cannot be read: {reason}") from None
        self._check_same(load(str(path)))
        return TrialState.FINISHED if read_summary(self.folder) else TrialState.UNFINISHED

    def _check_same(self, existing: Config) -> None:
        """UsageError if the configurations differ in more than folders and paths."""
        old, new = (self._comparable(config) for config in (existing, self.config))
        different = [key for key in {**new, **old} if old.get(key) != new.get(key)]
        if different:
            key, more = different[0], len(different) - 1
            raise UsageError(
                f"{self.folder} holds a run with {key} {json.dumps(old.get(key))}, and this "
                f"comparison has {json.dumps(new.get(key))}{f' (and {more} more)' * (more > 0)}; "
                "choose another folder with --out, or remove that folder"
            )

    def _comparable(self, config: Config) -> dict[str, Any]:
        """Settings by dotted key, without the paths of folders, data and modules."""
        settings = config.must_agree()
        del settings["resume"]  # an interrupted trial continues
        if self.teachers_from is not None:  # the whole comparison may have been moved
            for key, value in settings.items():
                if re.fullmatch(r"networks\.[^.]+\.weights", key) and value is not None:
                    settings[key] = Path(value).parts[-3:]
        return settings


def parse_strategies(text: str, option: str = "--strategies") -> list[Variant]:
    """Parse the option --strategies, for example "dml,threshold:delta=0.5,mine:Own:rate=2".

    The name, or package.module:callable, is followed by arguments of the form `:KEY=VALUE` with a
    value in YAML. Commas and colons in brackets or braces belong to a value. option: the option's
    name. UsageError if the text has another form.
    """
    variants = [_parse_strategy(piece.strip(), option) for piece in _split(text, ",")]
    folders = Counter(v.folder(Path(), 0) for v in variants)
    for variant in variants:
        if folders[variant.folder(Path(), 0)] > 1:
            raise UsageError(f"{option} {text}: {variant.label} occurs twice")
    return variants


def make_strategies(variants: Sequence[Variant]) -> dict[str, Strategy]:
    """Return the strategies by label; UsageError, with a line for each that cannot be made."""
    made: dict[str, Strategy] = {}
    mistakes = Mistakes()
    for variant in variants:
        with mistakes.noted():
            try:
                made[variant.label] = make_strategy(variant.name, variant.kwargs)
            except UsageError as error:
                raise type(error)(f"--strategies: {error}") from error.__cause__
    mistakes.tell()
    return made


def _parse_strategy(text: str, option: str) -> Variant:
    name, *rest = _split(text, ":")
    if rest and "=" not in rest[0]:
        name = f"{name}:{rest.pop(0)}"
    kwargs: dict[str, Any] = {}
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not equals or not key.isidentifier() or key in kwargs:
            raise UsageError(
                f"{option} {text}: found {argument!r}; allowed: NAME or "
                "package.module:callable, then each argument once, as :KEY=VALUE"
            )
        kwargs[key] = parse_yaml(value, f"{option} {text}")
    return Variant(name, kwargs)


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets and braces."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def parse_seeds(text: str) -> list[int]:
    """Parse the option --seeds: "3" means 0, 1 and 2; "0,1,5" is a list; "5," means only 5.

    UsageError if the text has another form.
    """
    words = text.removesuffix(",").split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", word) for word in words) or text == "0":
        raise UsageError(
            f"--seeds {text}: allowed are a number of seeds, like 3 (for 0, 1 and 2), or a list of "
            "seeds, like 0,1,5"
        )
    seeds = [int(word) for word in words]
    if "," not in text:
        return list(range(seeds[0]))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: a seed occurs twice")
    return seeds


def base_config(recipe: str, settings: Sequence[str]) -> Config:
    """Load the recipe with the settings, and with the strategy switokd.

    UsageError if a comparison sets one of the settings itself, or if the run file is wrong.
    """
    for setting in settings:
        key = setting.partition("=")[0]
        for reserved, option in RESERVED_SETTINGS.items():
            if key == reserved or key.startswith(f"{reserved}."):
                raise UsageError(f"{setting}: a comparison sets {reserved} itself; use {option}")
    return load_importable(recipe, [*settings, *SWITOKD.settings])


def make_trials(
    recipe: str,
    settings: Sequence[str],
    variants: Sequence[Variant],
    seeds: Iterable[int],
    out: Path,
) -> list[Trial]:
    """Trials of every variant with every seed, seed by seed.

    A strategy with frozen teachers (kd) loads them from the vanilla run of the same seed, unless
    the run file names their weights. The vanilla trials are added if needed. Strategies that do
    not switch use the semantics `paper`. UsageError if a strategy or a setting is wrong.
    """
    base = base_config(recipe, settings)
    untrained = [name for name in base.topology.teachers if base.networks[name].weights is None]
    strategies = make_strategies([VANILLA, *variants])
    frozen = [v.label for v in variants if strategies[v.label].frozen_teachers and untrained]
    if frozen and VANILLA not in variants:
        variants = [VANILLA, *variants]
    trials = []
    for seed in seeds:
        vanilla = VANILLA.folder(out, seed)
        for variant in variants:
            of_trial = [*variant.settings, f"seed={seed}"]
            of_trial.append(f"run_dir={json.dumps(str(variant.folder(out, seed)))}")
            if problem_of_strategy(base.distillation.semantics, strategies[variant.label]):
                of_trial.append("distillation.semantics=paper")
            teachers_from = vanilla if variant.label in frozen else None
            if teachers_from is not None:
                for name in untrained:
                    weights = json.dumps(str(teachers_from / "weights" / f"{name}.pt"))
                    of_trial.append(f"networks.{name}.weights={weights}")
            config = load(recipe, [*settings, *of_trial])
            arguments = (recipe, *settings, *of_trial)
            trials.append(Trial(variant, seed, config, arguments, teachers_from))
    return trials


def find_finished(out: Path) -> tuple[list[Variant], list[int]]:
    """Variants and seeds of the finished runs in a comparison's folder.

    UsageError if there is no finished run.
    """
    variants: dict[str, Variant] = {}
    seeds = set()
    for path in sorted(out.glob("*/config.yaml")):
        if not read_summary(path.parent):
            continue
        config = load(str(path))
        variant = Variant(config.distillation.strategy, config.distillation.strategy_kwargs)
        if variant.folder(out, config.seed) == path.parent:  # else a copy under another name
            variants[variant.label] = variant
            seeds.add(config.seed)
    if not variants:
        raise UsageError(f"{out} holds no finished run of a comparison")
    # The order of the paper: the own method last, after the baselines.
    order = [*(name for name in STRATEGIES if name != "switokd"), "switokd"]
    in_order = sorted(
        variants.values(),
        key=lambda v: (order.index(v.name) if v.name in order else len(order), v.label),
    )
    return in_order, sorted(seeds)
