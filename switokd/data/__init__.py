"""Data sets: opening them, order of the samples, augmentation, targets and batches.

Start reading at `images.py`. Not covered: inputs that are not images.
"""
