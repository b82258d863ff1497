"""Starts the ranks of one pod of a run: `python -m switokd.cli.pod_ranks RECIPE [KEY.KEY=VALUE]...`

torchrun would do so too, but turns every exit code into 1. This program ends with the code of the
rank that failed first, which the policy of a Kubernetes Job needs. Pod I starts the ranks from
I * LOCAL_WORLD_SIZE on. Imported without torch.

Not covered: starting lost ranks again, which is the matter of the Job; a pod of one rank, which is
`python -m switokd.train` itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping

from switokd.errors import UsageError
from switokd.runtime.environment import Environment
from switokd.runtime.interpreter import python_command
from switokd.runtime.lifecycle import one_line_errors
from switokd.runtime.log import set_up
from switokd.runtime.rank_processes import wait_for_ranks

NEEDED = ("NODE_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables: index of the pod, ranks of a pod, ranks of the run, where they meet."""


def ranks_of_pod(variables: Mapping[str, str]) -> range:
    """Return the ranks of this pod; UsageError if a variable is missing or does not fit."""
    if missing := [name for name in NEEDED if not variables.get(name)]:
        raise UsageError(
            f"environment variables {', '.join(missing)} are not set; "
            "'switokd k8s render' writes manifests that set them"
        )
    pod, here, world_size = (_count(variables, name) for name in NEEDED[:3])
    if not here or (pod + 1) * here > world_size:
        raise UsageError(
            f"environment variables NODE_RANK={pod}, LOCAL_WORLD_SIZE={here}: such a pod has no "
            f"ranks in a run of WORLD_SIZE={world_size}"
        )
    return range(pod * here, (pod + 1) * here)


def _count(variables: Mapping[str, str], name: str) -> int:
    text = variables[name]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"environment variable {name}={text}: allowed: a whole number")
    return int(text)


def main() -> None:
    """Start the ranks with this program's arguments; end with the exit code of the run."""
    set_up(sys.argv)
    with one_line_errors(Environment()):
        ranks = ranks_of_pod(os.environ)
        command = [*python_command("switokd.train"), *sys.argv[1:]]
        # As of torchrun: the ranks end when this process is gone, and one of them prints for all.
        more = {"TORCHELASTIC_RUN_ID": uuid.uuid4().hex, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        started: dict[int, int] = {}
        for local, rank in enumerate(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            started[subprocess.Popen(command, env={**os.environ, **more, **own}).pid] = rank
        code = wait_for_ranks(started, None, lambda rank: f"rank {rank}")
    sys.exit(code)


if __name__ == "__main__":
    main()
