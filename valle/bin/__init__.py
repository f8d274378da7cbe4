"""Commands: thin, parse, build, call."""
