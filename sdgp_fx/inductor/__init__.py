"""Generate Inductor's code for what the pass puts into graphs."""

# Device types on which a convolution's weight gradient has to come ahead of the prune in the graph:
# the lowering for C++ waits for it, while the one for a GPU has to be the gradient's first reader.
DENSE_HALF_FIRST = ("cpu",)
