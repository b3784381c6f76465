"""Command line: one thin module per verb, each exposing `command`."""
