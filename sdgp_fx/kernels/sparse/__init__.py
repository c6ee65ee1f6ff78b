"""Products that use the zeros of a pruned gradient."""
