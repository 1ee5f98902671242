from filet.cli.main import main

raise SystemExit(main())
