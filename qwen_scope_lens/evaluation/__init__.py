"""Footprints, redundancy, overlap and subsets of benchmarks."""
