"""The command line: one file a command, no logic; `foveate.cli.main` is the entry point."""
