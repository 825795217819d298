"""Benchmarks of the packaged models: `make bench`."""
