"""Exports a trained network as an artefact, and predicts with artefacts."""
