"""The scripts behind every figure in the README. Each takes ``--json PATH`` and writes flat keys."""
