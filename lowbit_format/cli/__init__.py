"""The command ``lowbit``: one file for each subcommand."""
