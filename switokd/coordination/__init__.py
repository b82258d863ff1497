"""How a rank reaches a decision: through the coordinator, or in its own process."""
