"""The dashboard of the training: accuracy, losses, speed, and the ranks.

Not covered: gaps and modes (`switching.py`); the coordinator itself (`service.py`).
"""

from __future__ import annotations

from dashboard import (
    NETWORK,
    RUN,
    WINDOW,
    dashboard,
    data_source,
    events_of_runs,
    labels_of,
    quantile,
    rate,
    run,
    starts_of_coordinators,
)
from panels import GREEN, GREY, RED, Json, Query, Row, layout, stat, table, time_series
from switching import epoch, state

NAME = "{{network}} ({{run}})"
RANK = "rank {{rank}} ({{run}})"


def build() -> Json:
    """Return the dashboard."""
    networks = f"switokd_samples_total{{{RUN}}}"
    return dashboard(
        "training",
        "Accuracy, losses and speed of each network, and what the ranks are doing.",
        [
            data_source(),
            run(),
            labels_of("network", "Network", networks, "Networks of the chosen runs."),
        ],
        [*events_of_runs(), starts_of_coordinators()],
        layout(
            [
                Row(4, _overview()),
                Row(9, _progress()),
                Row(8, _optimisation()),
                Row(8, _speed()),
                Row(8, _waiting(), header="Ranks"),
                Row(8, _resources()),
                Row(7, _tables()),
            ]
        ),
    )


def _overview() -> list[tuple[int, Json]]:
    accuracy = stat(
        "Accuracy on the test set",
        "Top-1 accuracy of each network in its last evaluation.",
        "percentunit",
        Query(f"switokd_test_accuracy_ratio{{{NETWORK}}}", NAME),
        decimals=1,
    )
    samples = stat(
        "Samples per second",
        "Training samples per second, of all chosen networks together.",
        "none",
        Query(f"sum by (run) ({rate('switokd_samples_total', NETWORK)})", "{{run}}"),
        decimals=0,
    )
    starts = stat(
        "Starts",
        "How often the run's processes were started. More than 1: it was interrupted, and went on.",
        "none",
        Query(f"switokd_run_attempt{{{RUN}}}", "{{run}}"),
        limits=[(None, GREY), (2, "orange")],
    )
    skipped = stat(
        "Skipped steps",
        "Steps that no network has applied, because a value was not finite. It should be 0.",
        "none",
        Query(f"switokd_skipped_steps_total{{{RUN}}}", "{{run}}"),
        limits=[(None, GREEN), (1, RED)],
    )
    return [(5, state()), (3, epoch()), (3, starts), (6, accuracy), (4, samples), (3, skipped)]


def _progress() -> list[tuple[int, Json]]:
    accuracy = time_series(
        "Accuracy",
        "Top-1 accuracy on the test set in the last evaluation (solid), and in training (dashed).",
        "percentunit",
        [
            Query(f"switokd_test_accuracy_ratio{{{NETWORK}}}", "{{network}} test ({{run}})"),
            Query(f"switokd_train_accuracy_ratio{{{NETWORK}}}", "{{network}} train ({{run}})"),
        ],
        dashed=" train ",
        max=1,
        decimals=1,
    )
    loss = time_series(
        "Loss",
        "Mean training loss of each network, with its distillation terms.",
        "none",
        [Query(f"switokd_loss{{{NETWORK}}}", NAME)],
    )
    return [(12, accuracy), (12, loss)]


def _optimisation() -> list[tuple[int, Json]]:
    terms = time_series(
        "Loss terms",
        "What the loss of one step consists of, with its weights: the cross-entropy (task), and "
        "the distillation from each peer. A paused teacher keeps its last values.",
        "none",
        [Query(f"switokd_loss_term{{{NETWORK}}}", "{{network}}: {{term}} {{peer}} ({{run}})")],
    )
    learning_rate = time_series(
        "Learning rate",
        "Learning rate of each network.",
        "none",
        [Query(f"switokd_learning_rate{{{NETWORK}}}", NAME)],
        min=0,
    )
    gradient = time_series(
        "Gradient norm",
        "L2 norm of each network's gradient, before it is clipped. The axis is logarithmic.",
        "none",
        [Query(f"switokd_gradient_norm{{{NETWORK}}}", NAME)],
        custom={"scaleDistribution": {"type": "log", "log": 10}},
    )
    return [(12, terms), (6, learning_rate), (6, gradient)]


def _speed() -> list[tuple[int, Json]]:
    samples = time_series(
        "Samples per second by network",
        "Training samples per second of each network.",
        "none",
        [Query(rate("switokd_samples_total", NETWORK), NAME)],
        min=0,
    )
    spent = rate("switokd_phase_seconds_total", RUN)
    phases = time_series(
        "Time by phase",
        "Share of the ranks' time that each phase takes. Much time in 'exchange' or 'deciding' "
        "means that ranks wait for others, or for the coordinator.",
        "percentunit",
        [
            Query(
                f"sum by (run, phase) ({spent}) / on (run) group_left () "
                f"(sum by (run) ({spent}) > 0)",
                "{{phase}} ({{run}})",
            )
        ],
        stacked=True,
        min=0,
    )
    saved = time_series(
        "Compute saved",
        "Share of the time of a network's ranks that its pauses have saved; 0 for students.",
        "percentunit",
        [Query(f"switokd_compute_saved_ratio{{{NETWORK}}}", NAME)],
        min=0,
    )
    return [(8, samples), (8, phases), (8, saved)]


def _waiting() -> list[tuple[int, Json]]:
    lag = time_series(
        "Steps behind",
        "Steps that each rank has reported less than the rank that has reported most.",
        "none",
        [Query(f"switokd_rank_lag_steps{{{RUN}}}", RANK)],
        min=0,
    )
    longest = time_series(
        "Time in the current phase",
        "How long each rank has been in the phase that it is in. A rank that all others wait for "
        "has a line of its own.",
        "s",
        [
            Query(f"switokd_rank_phase_seconds{{{RUN}}}", "rank {{rank}}: {{phase}} ({{run}})"),
            Query(
                f"switokd_rank_waited_for{{{RUN}}} * on (job, instance, run, rank) group_left () "
                f"sum without (phase) (switokd_rank_phase_seconds{{{RUN}}})",
                "waiting for rank {{rank}} ({{run}})",
            ),
        ],
        dashed="^waiting",
        min=0,
    )
    exchange = time_series(
        "Exchange of logits",
        "Median (dashed) and 99th percentile of the time of one exchange, on each rank.",
        "s",
        [
            Query(
                quantile(q, "switokd_exchange_seconds", RUN, "run, rank"),
                f"rank {{{{rank}}}} {text} ({{{{run}}}})",
            )
            for q, text in ((0.99, "p99"), (0.5, "p50"))
        ],
        dashed=" p50 ",
        min=0,
    )
    return [(8, lag), (8, longest), (8, exchange)]


def _resources() -> list[tuple[int, Json]]:
    memory = time_series(
        "Memory",
        "Resident memory of each rank's process.",
        "bytes",
        [Query(f"switokd_rank_memory_bytes{{{RUN}}}", RANK)],
        min=0,
    )
    gpu = time_series(
        "GPU memory",
        "Memory that each rank's process holds on its GPU. Empty for a run without GPUs.",
        "bytes",
        [Query(f"switokd_rank_gpu_memory_bytes{{{RUN}}}", RANK)],
        min=0,
        noValue="no GPU",
    )
    disk = time_series(
        "Disk free for the run folder",
        "Free space where rank 0 keeps the run folder, with its checkpoints.",
        "bytes",
        [Query(f"switokd_rank_disk_free_bytes{{{RUN}}}", RANK)],
        min=0,
    )
    saved = time_series(
        "Checkpoints and reconnects",
        "Checkpoints in the time of one window, and how often a rank has connected again.",
        "none",
        [
            Query(f"increase(switokd_checkpoints_total{{{RUN}}}{WINDOW})", "checkpoints ({{run}})"),
            Query(
                f"increase(switokd_rank_reconnects_total{{{RUN}}}{WINDOW})",
                "rank {{rank}} again ({{run}})",
            ),
        ],
        min=0,
        decimals=0,
    )
    return [(6, memory), (6, gpu), (6, disk), (6, saved)]


def _tables() -> list[tuple[int, Json]]:
    runs = table(
        "Runs",
        "Strategy and networks of each run.",
        Query(f"switokd_run_info{{{RUN}}}", "{{run}}"),
        {
            "run": "Run",
            "strategy": "Strategy",
            "semantics": "Semantics",
            "teachers": "Teachers",
            "students": "Students",
        },
    )
    ranks = table(
        "Ranks",
        "Where each rank runs, and which networks it trains.",
        Query(f"switokd_rank_info{{{RUN}}}", RANK),
        {"run": "Run", "rank": "Rank", "host": "Host", "networks": "Networks"},
    )
    return [(12, runs), (12, ranks)]
