"""The sparse codes of a corpus: the store, how it is filled, and what is asked of it first."""
