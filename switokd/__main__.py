"""`python -m switokd` is the command `switokd`."""

from switokd.cli.main import main

if __name__ == "__main__":
    main()
