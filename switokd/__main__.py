"""`python -m switokd` is the command `switokd`."""

from switokd.cli.main import main

main()
