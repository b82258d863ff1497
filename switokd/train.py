"""What torchrun starts, once per network: `torchrun ... -m switokd.train RECIPE`.

The loop is in `trainer.py`, the step in `step.py`. Nobody imports this module: as a name in the
package, `switokd.train` is the function in `api.py`.
"""

from switokd.runtime.environment import environment
from switokd.runtime.lifecycle import follow_launcher

if __name__ == "__main__":
    # Before all else: whoever starts this may die while PyTorch is being imported.
    follow_launcher(environment())
    from switokd.cli.worker import worker_main

    worker_main()
