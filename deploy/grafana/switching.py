"""The dashboard of the switching: gaps, thresholds, and what each teacher does, and why.

Not covered: accuracy and speed (`training.py`).
"""

from __future__ import annotations

from dashboard import (
    NETWORK,
    PAIR,
    RUN,
    dashboard,
    data_source,
    events_of_runs,
    labels_of,
    pair,
    rate,
    run,
    starts_of_coordinators,
)
from panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Json,
    Query,
    Row,
    layout,
    stat,
    state_timeline,
    thresholds,
    time_series,
)

NAME = "{{teacher}} → {{student}}"
REASONS = ("gap_within_threshold", "not_better", "gap_too_large")
"""Numbered from 1 in the timeline; 4 and 5 mean held, 6 another rule."""


def build() -> Json:
    """Return the dashboard."""
    teachers = f"switokd_teacher_paused{{{RUN}}}"
    return dashboard(
        "switching",
        "When the teachers pause, and why: gap against threshold, and the mode of each teacher.",
        [
            data_source(),
            run(),
            pair(),
            labels_of("network", "Teacher", teachers, "Teachers of the chosen runs."),
        ],
        [*events_of_runs(), starts_of_coordinators()],
        layout(
            [
                Row(4, _overview()),
                # The first screen of a run: what is compared, and what follows from it.
                Row(9, _gaps(), header="Run $run", repeat="run"),
                Row(6, [(24, teacher_timeline())]),
                Row(8, [*_distances(), (8, _paused_share())]),
                Row(7, [(12, _pair_timeline()), (12, _expert_share())]),
                Row(7, _counts()),
            ]
        ),
    )


def state() -> Json:
    """Return the state of each run, in colour."""
    return stat(
        "State",
        "What each run is doing: joining (ranks are missing), training, finished, failed or "
        "stopped. An ended run stays for a minute.",
        "none",
        Query(f"switokd_run_state{{{RUN}}} == 1", "{{run}}: {{state}}"),
        names={
            ": joining$": BLUE,
            ": training$": GREEN,
            ": finished$": "super-light-green",
            ": stopped$": "super-light-blue",
            ": failed$": RED,
        },
        noValue="no run",
    )


def epoch() -> Json:
    """Return the epoch of each run."""
    return stat(
        "Epoch",
        "The epoch of the training that each run is in, counted from 1.",
        "none",
        Query(f"switokd_run_epoch{{{RUN}}}", "{{run}}"),
    )


def _overview() -> list[tuple[int, Json]]:
    steps = stat(
        "Steps",
        "Steps decided by this coordinator.",
        "locale",
        Query(f"switokd_steps_total{{{RUN}}}", "{{run}}"),
    )
    speed = stat(
        "Steps per second",
        "Steps decided per second.",
        "ops",
        Query(rate("switokd_steps_total", RUN), "{{run}}"),
        decimals=1,
    )
    paused = stat(
        "Paused so far",
        "Share of all steps in which a teacher was paused: it neither learned nor was updated.",
        "percentunit",
        Query(f"switokd_paused_ratio{{{NETWORK}}}", "{{network}} ({{run}})"),
    )
    saved = stat(
        "Compute saved",
        "Share of the time of a teacher's ranks that its pauses have saved.",
        "percentunit",
        Query(
            f"switokd_compute_saved_ratio{{{NETWORK}}} "
            f"and on (job, instance, run, network) switokd_teacher_paused{{{NETWORK}}}",
            "{{network}} ({{run}})",
        ),
        decimals=1,
    )
    return [(5, state()), (3, epoch()), (3, steps), (3, speed), (5, paused), (5, saved)]


def _gaps() -> list[tuple[int, Json]]:
    gap = time_series(
        "Gap against threshold",
        "Distillation gap G of a teacher and its student (solid), and the switching threshold δ "
        "(dashed), both of the last step. A gap above its threshold means: the student falls "
        "behind. Then the teacher pauses, if it is the better one.",
        "none",
        [
            Query(f"switokd_gap{{{PAIR}}}", f"{NAME}: gap"),
            Query(f"switokd_threshold{{{PAIR}}}", f"{NAME}: threshold"),
        ],
        dashed=": threshold$",
        decimals=3,
    )
    margin = time_series(
        "Margin",
        "Gap less threshold. Below 0 (green) the teacher learns from this student; above 0 "
        "(orange) the gap is too large, and the teacher pauses if it is the better one.",
        "none",
        [Query(f"switokd_margin{{{PAIR}}}", NAME)],
        custom={"thresholdsStyle": {"mode": "line+area"}},
        thresholds=thresholds([(None, GREEN), (0, ORANGE)]),
        decimals=3,
    )
    return [(12, gap), (12, margin)]


def teacher_timeline() -> Json:
    """Return what each teacher does over time, with the reason."""
    reason = f"switokd_teacher_reason{{{NETWORK}, reason="
    codes = [f'{code} * {reason}"{name}"}}' for code, name in enumerate(REASONS, 1)]
    held = (
        f'{reason}"held"}} * on (job, instance, run, network) group_left () '
        f"(4 + switokd_teacher_paused{{{NETWORK}}})"
    )
    codes += [held, f'6 * {reason}"other"}}']
    return state_timeline(
        "Mode of each teacher, and why",
        "A sample per scrape of what each teacher does. Green: it learns, because the gap is "
        "within the threshold for at least one student. Yellow: it learns although the gap is "
        "too large, because it is not the better one (e_t is not below e_s). Orange: it is "
        "paused, because the gap is too large. Blue: a command holds it in a mode.",
        Query(f"max by (run, network) ({' or '.join(codes)})", "{{network}}"),
        {
            1: ("learns: gap within threshold", GREEN),
            2: ("learns: gap too large, but not the better one", "yellow"),
            3: ("paused: gap too large", ORANGE),
            4: ("learns: held by a command", "light-blue"),
            5: ("paused: held by a command", BLUE),
            6: ("another rule of the strategy", GREY),
        },
    )


def _distances() -> list[tuple[int, Json]]:
    errors = time_series(
        "e_s and e_t",
        "Mean L1 distance to the targets of the student's predictions, e_s (solid), and of the "
        "teacher's, e_t (dashed); from 0 (perfect) to 2. A teacher whose e_t is not below e_s is "
        "not the better one, and never pauses.",
        "none",
        [
            Query(f"switokd_e_s{{{PAIR}}}", f"{NAME}: e_s"),
            Query(f"switokd_e_t{{{PAIR}}}", f"{NAME}: e_t"),
        ],
        dashed=": e_t$",
        decimals=3,
    )
    epsilon = time_series(
        "epsilon",
        "Factor ε = exp(-e_t / (e_s + e_t)) in the threshold δ = e_s - ε e_t. It is above "
        "0.607 where the teacher is the better one.",
        "none",
        [Query(f"switokd_epsilon{{{PAIR}}}", NAME)],
        decimals=3,
    )
    return [(8, errors), (8, epsilon)]


def _paused_share() -> Json:
    paused = rate("switokd_paused_steps_total", NETWORK)
    steps = rate("switokd_steps_total", RUN)
    return time_series(
        "Paused share",
        "Share of the steps of the last seconds in which a teacher was paused.",
        "percentunit",
        [Query(f"{paused} / on (job, instance, run) group_left () ({steps} > 0)", "{{network}}")],
        min=0,
        max=1,
    )


def _pair_timeline() -> Json:
    return state_timeline(
        "Mode of each pair",
        "A sample per scrape. A teacher with several students pauses when all its pairs are in "
        "expert mode; a pair in expert mode alone only drops its student's term from the loss.",
        Query(f"switokd_learning_mode{{{PAIR}}}", NAME),
        {1: ("learning", GREEN), 0: ("expert", ORANGE)},
    )


def _expert_share() -> Json:
    counted = rate("switokd_pair_steps_total", PAIR)
    expert = rate("switokd_pair_steps_total", f'{PAIR}, mode="expert"')
    return time_series(
        "Expert share",
        "Share of the steps of the last seconds in which a pair was in expert mode.",
        "percentunit",
        [
            Query(
                f"sum without (mode) ({expert}) / (sum without (mode) ({counted}) > 0)",
                NAME,
            )
        ],
        min=0,
        max=1,
    )


def _counts() -> list[tuple[int, Json]]:
    switches = time_series(
        "Switches per minute",
        "Changes of a pair's mode per minute. Many of them mean that gap and threshold are close.",
        "none",
        [Query(f"60 * {rate('switokd_switches_total', PAIR)}", NAME)],
        min=0,
    )
    times = time_series(
        "Time in mode",
        "Time that a pair has spent in each mode since the run started.",
        "s",
        [Query(f"switokd_mode_seconds_total{{{PAIR}}}", f"{NAME}: {{{{mode}}}}")],
        dashed=": learning$",
        min=0,
    )
    return [(12, switches), (12, times)]
