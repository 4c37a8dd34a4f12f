"""The command line: thin commands over library calls, one module a command."""
