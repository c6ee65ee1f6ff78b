"""The settings that the paper compares on CIFAR-10, with the accuracies that it reports."""

from __future__ import annotations

from .experiment import Setting

DENSE = Setting("dense", None, 95.3)

RESCALED = "rescaled_magnitude"

# Table I, CIFAR-10, 2:4.
TABLE1 = (
    DENSE,
    Setting("random", {"sdgp.prune": "random"}, 94.5),
    Setting("magnitude", {"sdgp.prune": "magnitude"}, 95.2),
    Setting(RESCALED, {"sdgp.prune": RESCALED}, 95.2),
)

# The authors' repository lists these beside Fig. 8.
_FIG8 = {
    (2, 4): 95.2,
    (1, 4): 95.1,
    (4, 8): 95.2,
    (2, 8): 95.1,
    (1, 8): 94.7,
    (8, 16): 95.2,
    (4, 16): 95.2,
    (2, 16): 95.1,
    (16, 32): 95.3,
    (8, 32): 95.3,
    (4, 32): 94.9,
}
FIG8 = (
    DENSE,
    *(
        Setting(f"{n}:{m}", {"sdgp.n": n, "sdgp.m": m, "sdgp.prune": RESCALED}, paper)
        for (n, m), paper in _FIG8.items()
    ),
)

# Not in the paper: the unbiased function, and the scopes of the rescaled one, at 2:4.
BEYOND = (
    DENSE,
    Setting("mvue", {"sdgp.prune": "mvue"}),
    *(
        Setting(f"{RESCALED}, {scope}", {"sdgp.prune": RESCALED, "sdgp.rescale": scope})
        for scope in ("group", "feature_map", "channel")
    ),
)
