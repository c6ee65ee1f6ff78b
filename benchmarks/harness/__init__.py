"""What the benchmark commands share: command line, reports, terminal, workers."""
