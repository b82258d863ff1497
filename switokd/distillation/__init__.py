"""The paper: topology, gap, distances, decision, losses, strategies."""
