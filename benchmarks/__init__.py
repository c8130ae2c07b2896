"""Speed and memory, measured beside a baseline in the same run. `python -m benchmarks --help`."""
