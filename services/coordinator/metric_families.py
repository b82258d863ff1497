"""All metrics of the coordinator: name, type, meaning and labels.

Names follow the conventions of Prometheus (base units, `_total`, `_ratio`). Every name begins with
`switokd_`, and that of a counter ends in `_total`. Labels are bounded: a plan names the networks
and ranks, and all other labels have a few values. `docs/metrics.md` has the same table, and a test
compares both.

Not covered: the values (`run_series.py`, `service_series.py`).
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """What one metric is. kind: gauge, counter or histogram."""

    kind: str
    text: str
    labels: tuple[str, ...] = ()


RUN, PAIR = ("run",), ("run", "teacher", "student")
NETWORK, RANK = ("run", "network"), ("run", "rank")

PAIR_FAMILIES = {
    "gap": Family("gauge", "Distillation gap G of the last step.", PAIR),
    "threshold": Family("gauge", "Switching threshold delta of the last step.", PAIR),
    "margin": Family("gauge", "Gap minus threshold of the last step.", PAIR),
    "epsilon": Family("gauge", "Epsilon of the last step, from which the threshold follows.", PAIR),
    "e_s": Family("gauge", "Distance of the student to the labels, last step.", PAIR),
    "e_t": Family("gauge", "Distance of the teacher to the labels, last step.", PAIR),
    "learning_mode": Family("gauge", "1 in learning mode, 0 in expert mode.", PAIR),
    "switches": Family("counter", "Changes of a pair's mode.", PAIR),
    "pair_steps": Family("counter", "Steps of a pair by mode.", (*PAIR, "mode")),
    "mode_seconds": Family("counter", "Time that a pair has been in a mode.", (*PAIR, "mode")),
}
TEACHER_FAMILIES = {
    "teacher_paused": Family("gauge", "1 if the teacher was paused in the last step.", NETWORK),
    "teacher_reason": Family(
        "gauge", "1 for the reason why the teacher learns or is paused.", (*NETWORK, "reason")
    ),
    "paused_steps": Family("counter", "Steps in which a teacher was paused.", NETWORK),
    "paused_ratio": Family("gauge", "Share of all steps in which a teacher was paused.", NETWORK),
    "decision_wait_seconds": Family(
        "histogram", "Time that a teacher's rank waited for a decision.", NETWORK
    ),
}
NETWORK_FAMILIES = {
    "loss": Family("gauge", "Mean training loss of the last progress.", NETWORK),
    "loss_term": Family(
        "gauge",
        "Summand of the loss in the last step that was looked at.",
        (*NETWORK, "term", "peer"),
    ),
    "learning_rate": Family("gauge", "Learning rate of the last progress.", NETWORK),
    "gradient_norm": Family(
        "gauge",
        "L2 norm of the gradient of a recent optimizer step, before it is clipped.",
        NETWORK,
    ),
    "train_accuracy_ratio": Family("gauge", "Top-1 accuracy in training, last progress.", NETWORK),
    "test_accuracy_ratio": Family(
        "gauge", "Top-1 accuracy on the test set, last evaluation.", NETWORK
    ),
    "samples": Family("counter", "Training samples processed.", NETWORK),
    "compute_saved_ratio": Family(
        "gauge", "Share of the training time of a network's ranks that its pauses saved.", NETWORK
    ),
}
RANK_FAMILIES = {
    "rank_info": Family(
        "gauge", "1; the rank's machine and networks.", (*RANK, "host", "networks")
    ),
    "rank_step": Family("gauge", "Last step that a rank has reported.", RANK),
    "rank_lag_steps": Family("gauge", "Steps behind the rank that has reported most.", RANK),
    "rank_phase_seconds": Family(
        "gauge", "Time that a rank has been in its phase.", (*RANK, "phase")
    ),
    "phase_seconds": Family("counter", "Time that a rank has spent in a phase.", (*RANK, "phase")),
    "heartbeat_age_seconds": Family("gauge", "Time since the last heartbeat of a rank.", RANK),
    "rank_waited_for": Family(
        "gauge", "1 if a rank is silent, or stays in a phase while all others wait; else 0.", RANK
    ),
    "rank_reconnects": Family("counter", "Streams that a rank has opened after its first.", RANK),
    "rank_memory_bytes": Family("gauge", "Resident memory of a rank's process.", RANK),
    "rank_gpu_memory_bytes": Family("gauge", "GPU memory that a rank's process holds.", RANK),
    "rank_disk_free_bytes": Family("gauge", "Free space where the run folder is.", RANK),
    "exchange_seconds": Family(
        "histogram", "Time that the exchange of logits took on a rank.", RANK
    ),
}
RUN_FAMILIES = {
    "run_info": Family(
        "gauge",
        "1; the run's strategy and networks.",
        ("run", "strategy", "semantics", "teachers", "students"),
    ),
    "run_state": Family("gauge", "1 for the state of the run, 0 for all others.", ("run", "state")),
    "run_attempt": Family("gauge", "Number of the start of the run's processes.", RUN),
    "run_epoch": Family("gauge", "Epoch of the training, counted from 1.", RUN),
    "run_planned_epochs": Family("gauge", "Epochs of the whole training.", RUN),
    "run_planned_steps": Family("gauge", "Steps of the whole training.", RUN),
    "run_started_timestamp_seconds": Family("gauge", "When the run was first started.", RUN),
    "last_decision_timestamp_seconds": Family("gauge", "When the last step was decided.", RUN),
    "steps": Family("counter", "Steps decided.", RUN),
    "decided_alone_steps": Family(
        "counter", "Steps that ranks applied without waiting for the coordinator.", RUN
    ),
    "skipped_steps": Family(
        "counter", "Steps that no network has applied, because a value was not finite.", RUN
    ),
    "checkpoints": Family("counter", "Checkpoints of the run.", RUN),
    "commands": Family("counter", "Commands that the run was given.", ("run", "action")),
    "connected_ranks": Family("gauge", "Ranks with an open stream.", RUN),
    "expected_ranks": Family("gauge", "Ranks of the run.", RUN),
    "round_duration_seconds": Family(
        "histogram", "Time from a step's first report to its decision.", RUN
    ),
}
SERVICE_FAMILIES = {
    "build_info": Family(
        "gauge", "1; the coordinator's version.", ("version", "python", "protocol")
    ),
    "start_timestamp_seconds": Family("gauge", "When the coordinator was started."),
    "runs": Family("gauge", "Runs that the coordinator knows, by state.", ("state",)),
    "hidden_runs": Family(
        "gauge", "Runs that are too many or too large for this page: all or rank.", ("series",)
    ),
    "refused_messages": Family("counter", "Calls and streams that were refused.", ("reason",)),
    "journal_lag_steps": Family("gauge", "Steps that are decided and not yet on the disk."),
    "journal_errors": Family("counter", "Transactions and rows that the journal could not write."),
    "journal_disk_free_bytes": Family("gauge", "Free space where the journal is."),
}
FAMILIES: dict[str, Family] = {
    **PAIR_FAMILIES,
    **TEACHER_FAMILIES,
    **NETWORK_FAMILIES,
    **RANK_FAMILIES,
    **RUN_FAMILIES,
    **SERVICE_FAMILIES,
}
"""By name, without the prefix and without `_total`."""
