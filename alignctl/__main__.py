"""`python -m alignctl`."""

from alignctl.cli.main import main

main()
