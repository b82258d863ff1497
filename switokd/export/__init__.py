"""Trained networks as artefacts, and predictions from artefacts."""
