"""`python -m receiver` is `receiver`."""

from receiver.cli.main import main

main()
