"""Data sets, their order, augmentation and targets."""
