"""Trackers: observers that write a run's numbers where other tools show them.

    tracker.py           the base class: events become rows of numbers by name
    numbers.py           the numbers of decisions, steps and epochs
    tensorboard.py       event files in the run folder
    mlflow.py            a run of MLflow, in files or on a server
    wandb.py             a run of Weights & Biases, offline unless asked otherwise

Not covered: who calls observers (`training/trainer.py`), and what follows their errors
(`runs/observers.py`).
"""
