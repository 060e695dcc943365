"""The README, the docs and the help texts, followed as a reader would: `make follow`."""
