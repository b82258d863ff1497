"""Commands: one module per command of `switokd`."""
