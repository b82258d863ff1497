"""Networks by name, one module per family."""
