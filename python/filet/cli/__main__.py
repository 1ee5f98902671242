"""``python -m filet.cli``: the program ``filet`` where it is not on the path."""

from filet.cli.main import main

raise SystemExit(main())
