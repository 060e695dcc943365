"""Programs for people who work on this repository. None of it is in the wheel."""
