"""The command line: one module per command. torch is imported inside the commands, so that --help is quick."""
