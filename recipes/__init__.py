"""One file per job, each a function that reads top to bottom."""
