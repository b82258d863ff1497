"""The dashboard of the service: coordinators, decisions, journal, connections.

Not covered: what the runs learn (`training.py`, `switching.py`).
"""

from __future__ import annotations

from dashboard import (
    INSTANCE,
    RUN,
    WINDOW,
    address,
    dashboard,
    data_source,
    events_of_runs,
    labels_of,
    quantile,
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
    table,
    time_series,
)

SELECTED = f"{INSTANCE}, {RUN}"
ACTIVE = f'switokd_run_state{{{SELECTED}, state=~"joining|training"}} == 1'


def build() -> Json:
    """Return the dashboard."""
    coordinators = labels_of(
        "instance", "Coordinator", "switokd_build_info", "Coordinators that Prometheus scrapes."
    )
    return dashboard(
        "service",
        "Whether the coordinators are well: decisions, journal, connections, resources.",
        [data_source(), coordinators, run(f"switokd_run_state{{{INSTANCE}}}")],
        [starts_of_coordinators(INSTANCE), *events_of_runs()[1:3]],
        layout(
            [
                Row(4, _overview()),
                Row(9, _latency()),
                Row(8, _runs()),
                Row(8, _connections()),
                Row(8, _journal()),
                Row(8, _process()),
            ]
        ),
    )


def _overview() -> list[tuple[int, Json]]:
    up = stat(
        "Coordinators",
        "Whether each coordinator of the last day answers Prometheus.",
        "none",
        Query(
            f"up{{{INSTANCE}}} and on (job, instance) last_over_time(switokd_build_info[1d])",
            "{{instance}}",
        ),
        limits=[(None, RED), (1, GREEN)],
        mappings=[{"type": "value", "options": {"0": {"text": "down"}, "1": {"text": "up"}}}],
    )
    version = stat(
        "Version",
        "Version of each coordinator, and of the Python that runs it.",
        "none",
        Query(f"switokd_build_info{{{INSTANCE}}}", "{{version}} (Python {{python}})"),
        names={".": BLUE},
    )
    age = stat(
        "Running for",
        "Time since each coordinator started.",
        "s",
        Query(f"time() - switokd_start_timestamp_seconds{{{INSTANCE}}}", "{{instance}}"),
        decimals=0,
    )
    runs = stat(
        "Runs",
        "Runs by state. Ended runs are counted until the coordinator forgets them.",
        "none",
        Query(f"sum by (state) (switokd_runs{{{INSTANCE}}})", "{{state}}"),
    )
    missing = stat(
        "Ranks missing",
        "Ranks that runs wait for while they join or train. It should be 0.",
        "none",
        Query(
            f"sum((switokd_expected_ranks{{{SELECTED}}} - switokd_connected_ranks{{{SELECTED}}}) "
            f"and on (job, instance, run) {ACTIVE})",
            "missing",
        ),
        limits=[(None, GREEN), (1, ORANGE)],
        noValue="no run",
    )
    return [(5, up), (4, version), (4, age), (6, runs), (5, missing)]


def _latency() -> list[tuple[int, Json]]:
    texts = ((0.99, "p99"), (0.5, "p50"))
    rounds = time_series(
        "Round duration",
        "Time from a step's first report to its decision: 99th percentile, and median (dashed). "
        "It holds the time that ranks wait for each other.",
        "s",
        [
            Query(
                quantile(q, "switokd_round_duration_seconds", SELECTED, "run"),
                f"{text} ({{{{run}}}})",
            )
            for q, text in texts
        ],
        dashed="^p50 ",
        min=0,
    )
    waits = time_series(
        "Decision wait",
        "Time that a teacher's rank waits for a decision: 99th percentile, and median (dashed).",
        "s",
        [
            Query(
                quantile(q, "switokd_decision_wait_seconds", SELECTED, "run, network"),
                f"{{{{network}}}} {text} ({{{{run}}}})",
            )
            for q, text in texts
        ],
        dashed=" p50 ",
        min=0,
    )
    return [(12, rounds), (12, waits)]


def _runs() -> list[tuple[int, Json]]:
    links = [
        {"title": title, "url": f"{address(name, 'var-run=${__value.text}')}&${{__url_time_range}}"}
        for title, name in (("Switching", "switching"), ("Training", "training"))
    ]
    runs = table(
        "Runs of the coordinators",
        "Choose a run's name to see its switching or its training.",
        Query(f"switokd_run_info{{{SELECTED}}}", "{{run}}"),
        {
            "run": "Run",
            "instance": "Coordinator",
            "strategy": "Strategy",
            "teachers": "Teachers",
            "students": "Students",
        },
        {"Run": links},
    )
    speed = time_series(
        "Decisions per second",
        "Steps decided per second, and those of them that ranks applied without waiting for the "
        "coordinator (dashed).",
        "ops",
        [
            Query(rate("switokd_steps_total", SELECTED), "{{run}}"),
            Query(rate("switokd_decided_alone_steps_total", SELECTED), "{{run}}: decided alone"),
        ],
        dashed=": decided alone$",
        min=0,
    )
    return [(12, runs), (12, speed)]


def _connections() -> list[tuple[int, Json]]:
    ranks = time_series(
        "Ranks",
        "Ranks with an open stream, and those that the run consists of (dashed).",
        "none",
        [
            Query(f"switokd_connected_ranks{{{SELECTED}}}", "{{run}}: connected"),
            Query(f"switokd_expected_ranks{{{SELECTED}}}", "{{run}}: expected"),
        ],
        dashed=": expected$",
        min=0,
        decimals=0,
    )
    silence = time_series(
        "Last heard of",
        "Longest time since the last heartbeat of a rank. Every second is normal.",
        "s",
        [Query(f"max by (run) (switokd_heartbeat_age_seconds{{{SELECTED}}})", "{{run}}")],
        min=0,
    )
    refused = time_series(
        "Refused per minute",
        "Calls and messages that a coordinator has refused, by gRPC status.",
        "none",
        [
            Query(
                f"60 * sum by (reason) ({rate('switokd_refused_messages_total', INSTANCE)})",
                "{{reason}}",
            )
        ],
        min=0,
    )
    return [(8, ranks), (8, silence), (8, refused)]


def _journal() -> list[tuple[int, Json]]:
    lag = time_series(
        "Journal lag",
        "Steps that are decided and not on disk yet. Empty without --journal.",
        "none",
        [Query(f"switokd_journal_lag_steps{{{INSTANCE}}}", "{{instance}}")],
        min=0,
        noValue="no journal",
    )
    errors = time_series(
        "Journal errors",
        "Writes to the journal that failed, in the time of one window. It should be 0.",
        "none",
        [Query(f"increase(switokd_journal_errors_total{{{INSTANCE}}}{WINDOW})", "{{instance}}")],
        min=0,
        decimals=0,
        noValue="no journal",
    )
    disk = time_series(
        "Disk free for the journal",
        "Free space where the journal is.",
        "bytes",
        [Query(f"switokd_journal_disk_free_bytes{{{INSTANCE}}}", "{{instance}}")],
        min=0,
        noValue="no journal",
    )
    return [(8, lag), (8, errors), (8, disk)]


def _process() -> list[tuple[int, Json]]:
    # Other programs have metrics of these names too.
    ours = f"and on (job, instance) switokd_build_info{{{INSTANCE}}}"
    cpu = time_series(
        "CPU",
        "Share of one core that the coordinator uses. It decides on one core: near 100 % it is "
        "the bottleneck, and runs need a second coordinator.",
        "percentunit",
        [Query(f"{rate('process_cpu_seconds_total', INSTANCE)} {ours}", "{{instance}}")],
        min=0,
    )
    memory = time_series(
        "Coordinator's memory",
        "Resident memory of the coordinator's process.",
        "bytes",
        [Query(f"process_resident_memory_bytes{{{INSTANCE}}} {ours}", "{{instance}}")],
        min=0,
    )
    files = time_series(
        "Open files",
        "Open files of the coordinator (each connection is one), and its limit (dashed).",
        "none",
        [
            Query(f"process_open_fds{{{INSTANCE}}} {ours}", "{{instance}}: open"),
            Query(f"process_max_fds{{{INSTANCE}}} {ours}", "{{instance}}: limit"),
        ],
        dashed=": limit$",
        custom={"scaleDistribution": {"type": "log", "log": 10}},
    )
    hidden = stat(
        "Hidden runs",
        "Runs that are left out of /metrics, in whole (all) or without their ranks (rank), "
        "because it would be too long. It should be 0.",
        "none",
        Query(f"sum by (series) (switokd_hidden_runs{{{INSTANCE}}})", "{{series}}"),
        limits=[(None, GREY), (1, ORANGE)],
    )
    return [(7, cpu), (7, memory), (6, files), (4, hidden)]
