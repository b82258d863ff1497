"""The method of the paper: topology, distances, decision, losses and strategies.

Qian et al., "Switchable Online Knowledge Distillation", ECCV 2022, arXiv:2209.04996.

    topology.py     networks, roles, teacher-student pairs
    couplings.py    weight and temperature of each KL term
    gap.py          G, e_s, e_t of a pair; epsilon and the threshold delta
    distances.py    the L1 distances behind G, e_s, e_t, computed from logits      (torch)
    decision.py     expert mode or learning mode, per pair and step
    losses.py       cross-entropy and KL terms                                     (torch)
    strategies/     SwitOKD and the paper's baselines: who learns from whom
    semantics.py    differences between the paper and its published code
    method.py       all of the above, combined for one run

Only the modules marked `(torch)` import PyTorch. The coordinator has no PyTorch and uses the
other modules. Strategies that combine logits (KDCL) import PyTorch when they compute.

Not covered: the training step (`training/step.py`), placement on ranks (`runtime/placement.py`).
"""
