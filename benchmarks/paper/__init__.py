"""The tables and figures of McDanel et al. 2022, measured again: `python -m benchmarks.paper`."""
