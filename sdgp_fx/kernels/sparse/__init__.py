"""Products that skip the zeros of a pruned gradient."""
