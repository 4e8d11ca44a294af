"""The figures of docs/benchmarks.md: measured as ratios within one run, beside an A/A run of the baseline."""
