"""`python -m streamgen` is the same as the `streamgen` command."""

from streamgen.cli.main import main

raise SystemExit(main())
