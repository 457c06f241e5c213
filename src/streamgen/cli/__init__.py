"""The command line: one command per file, each over the public API."""
