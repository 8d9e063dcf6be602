"""`python -m poweropd` is the `poweropd` command."""

from poweropd.cli import main

main()
