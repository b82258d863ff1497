"""The coordinator's limits: what one stranger, or a faulty rank, can take of it.

Each field is an option of `switokd coordinator`: `max_runs` is `--max-runs`. A refusal names limit,
value and option, and only the one who is refused sees it.

Not covered: who may do what (a secret, certificates, tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from switokd.services.coordinator.refusal import Refusal


def _number(default: float, help: str, least: float = 1, most: float = 10**9) -> Any:
    """Return a field with the help text of its option and the numbers that it allows."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True)
class Limits:
    """Numbers of a coordinator. Those with `seconds` in their name may have decimals."""

    max_runs: int = _number(1000, "Runs, with ended ones that are not forgotten yet.")
    max_ranks: int = _number(1024, "Ranks of a run.")
    max_networks: int = _number(64, "Networks of a run.")
    max_pairs: int = _number(24, "Pairs of a run that are not switched off.")
    max_parts: int = _number(
        4096, "Pairs of a run, each counted once per rank that holds the pair's teacher."
    )
    max_round_timeout: float = _number(
        86_400.0, "Seconds that a run may set as its timeout (coordinator.timeout)."
    )
    max_name_length: int = _number(200, "Characters of the name of a run, network or strategy.")
    max_kwargs_length: int = _number(4096, "Characters of a strategy's arguments.")
    max_sentence_length: int = _number(
        1000, "Characters of a rank's sentence, such as why it failed; the rest is cut off."
    )
    max_message_bytes: int = _number(
        2**16, "Bytes of a message, such as a run's plan.", 1024, 2**28
    )
    max_report_bytes: int = _number(2**15, "Bytes of a message on a rank's stream.", 1024, 2**28)
    call_rate: float = _number(
        100.0, "Calls per second of a connection; a faster one waits, then is refused."
    )
    call_burst: float = _number(3000.0, "Calls of a connection that may come at once.")
    message_rate: float = _number(
        1500.0, "Messages per second of a stream; a faster one waits. 2 KiB count as one more."
    )
    message_burst: float = _number(2000.0, "Messages of a stream that may come at once.")
    max_open_rounds: int = _number(
        100_000,
        "Steps of a run that not all ranks have reported: a rank that is ahead waits. Also steps "
        "whose decision a rank does not acknowledge. 4 parts (see --max-parts) count as one.",
    )
    max_waiting_responses: int = _number(
        5000, "Responses that wait for a rank that does not read them."
    )
    attach_seconds: float = _number(
        10.0, "Seconds that a stream may stay open without an attach.", 0.1, 3600.0
    )
    max_unattached_streams: int = _number(
        256, "Streams without an attach; one more ends the oldest of them."
    )
    max_watchers: int = _number(200, "Callers of WatchRun at once.")
    max_streams: int = _number(16_384, "Calls at once, streams among them.")
    max_streams_per_connection: int = _number(128, "Calls at once of one connection.")
    max_connections: int = _number(
        8192, "gRPC connections; fewer if the system allows fewer files."
    )
    handshake_seconds: float = _number(
        10.0, "Seconds that a new gRPC connection may take to begin.", 0.1, 3600.0
    )
    idle_connection_seconds: float = _number(
        60.0, "Seconds that a gRPC connection may stay open without a call.", 0.1, 86_400.0
    )
    http_header_seconds: float = _number(
        5.0, "Seconds that an HTTP request may take to arrive.", 0.1, 3600.0
    )
    max_http_header_bytes: int = _number(16_384, "Bytes of an HTTP request.", 64, 2**20)
    max_http_connections: int = _number(
        32, "HTTP connections; one more ends the one that has sent no request for longest."
    )
    forget_after: float = _number(
        60.0, "Seconds for which an ended run stays in memory and in the metrics.", 0, 86_400.0
    )
    max_metrics_ended: int = _number(
        100, "Ended runs in /metrics; those that failed and the newest come first."
    )
    max_metrics_lines: int = _number(
        100_000, "Lines of /metrics; runs with connected ranks, small and new ones come first."
    )
    max_metrics_bytes: int = _number(
        8 * 2**20,
        "Bytes of /metrics; a run that does not fit is shown without its ranks, or not at all.",
        2**16,
        2**30,
    )
    max_history_mib: int = _number(
        64,
        "MiB, about, that the status page's charts of all runs may take; beyond it they are "
        "coarser.",
        1,
        2**16,
    )
    max_page_streams: int = _number(
        16, "Status pages that are kept up to date at once; half of --max-http-connections at most."
    )
    log_rate: int = _number(20, "Lines of one kind in the log, per second.")

    def check_name(self, what: str, name: str) -> None:
        """Raise Refusal if a name is too long, or has characters that cannot be printed.

        what: what has this name, such as "the run".
        """
        if len(name) > self.max_name_length:
            kind = Refusal.Kind.INVALID_ARGUMENT
            found = f"{what} has a name of {len(name)} characters"
            raise exceeded(found, "max_name_length", self.max_name_length, kind)
        if not name.isprintable():
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"{what} has a name with characters that cannot be printed: {name!r}",
            )


DEFAULTS = Limits()


def option(name: str) -> str:
    """Return the command line's option for a field of `Limits`."""
    return f"--{name.replace('_', '-')}"


def exceeded(
    what: str, name: str, limit: float, kind: Refusal.Kind = Refusal.Kind.RESOURCE_EXHAUSTED
) -> Refusal:
    """Return the refusal of something that is over a limit.

    what: what was found, such as "the run has 70 networks". name: of the field of `Limits`.
    """
    return Refusal(
        kind,
        f"{what}: this coordinator's limit is {limit:,g} ({option(name)})",
    )
