"""The tests and benchmarks of SAELens and TransformerLens, run against our classes."""
