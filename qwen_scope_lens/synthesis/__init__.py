"""Find the features that data never activates, write data that fires them, prove it."""
