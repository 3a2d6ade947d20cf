"""``python -m synthfast`` is the same program as ``synthfast``; torchrun starts it this way."""

from synthfast.cli.main import main

main()
