"""`python -m switokd` is the command `switokd`."""

from switokd.cli import main

main()
