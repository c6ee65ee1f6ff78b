"""Settings that the paper compares on CIFAR-10, with the accuracies that it reports, and others."""

from __future__ import annotations

import dataclasses

from sdgp_fx import SDGPConfig

from .experiment import Setting

DENSE = Setting("dense", None, 95.3)

RESCALED = "rescaled_magnitude"

# Table I, CIFAR-10, 2:4.
TABLE1 = (
    DENSE,
    Setting("random", SDGPConfig(prune="random"), 94.5),
    Setting("magnitude", SDGPConfig(prune="magnitude"), 95.2),
    Setting(RESCALED, SDGPConfig(prune=RESCALED), 95.2),
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
        Setting(f"{n}:{m}", SDGPConfig(n=n, m=m, prune=RESCALED), paper)
        for (n, m), paper in _FIG8.items()
    ),
)

MVUE = Setting("mvue", SDGPConfig(prune="mvue"))

# Not in the paper: random times m / n, the unbiased function, and the scopes of the rescaled one.
BEYOND = (
    *TABLE1[:2],
    Setting("random times m / n", SDGPConfig(prune="random"), scale=2.0),
    MVUE,
    TABLE1[2],
    *(
        Setting(f"{RESCALED}, {scope}", SDGPConfig(prune=RESCALED, rescale=scope))
        for scope in ("group", "feature_map", "channel")
    ),
)

# Not in the paper, which has half precision.
PRECISION = tuple(
    Setting(f"{name}, {dtype}", config, dtype=dtype)
    for dtype in ("float16", "bfloat16")
    for name, config in (
        ("dense", None),
        ("magnitude", SDGPConfig(prune="magnitude")),
        (RESCALED, SDGPConfig(prune=RESCALED)),
        ("mvue", SDGPConfig(prune="mvue")),
    )
)

# Not in the paper: whole channels, in all layers, beside the elements that it prunes.
CHANNELS = (
    DENSE,
    Setting("elements 2:4", SDGPConfig(prune=RESCALED)),
    *(
        Setting(
            f"channels {n}:{m}, {function}",
            SDGPConfig(n=n, m=m, prune=function, structure="channel"),
        )
        for function in (RESCALED, "magnitude", "mvue", "random")
        for n, m in ((2, 4), (1, 4), (2, 16))
    ),
    *(
        Setting(
            f"channels 2:4, {function}, last fifth dense",
            SDGPConfig(prune=function, structure="channel"),
            dense_last=0.2,
        )
        for function in (RESCALED, "magnitude")
    ),
)
WHOLE_CHANNELS = next(s for s in CHANNELS if s.name == "channels 2:4, magnitude")

# Fig. 10's n:m and two with larger groups, whose products save time.
_FASTER = ((2, 4), (1, 4), (2, 8), (2, 16), (4, 32))
_MAGNITUDES = tuple(
    Setting(f"magnitude, {n}:{m}", SDGPConfig(n=n, m=m, prune="magnitude")) for n, m in _FASTER
)
_RESCALED = tuple(s for s in FIG8 if s.config and (s.config.n, s.config.m) in _FASTER)

# Elements, and whole channels, of which gradients are compared.
SIGNAL = (*BEYOND[1:], WHOLE_CHANNELS, *_RESCALED[1:])

# Functions and scopes, where fewer values are kept, and gradients that are dense at the end.
PATTERNS = (
    DENSE,
    *_MAGNITUDES,
    *_RESCALED,
    *(
        Setting(
            f"{n}:{m}, feature_map",
            SDGPConfig(n=n, m=m, prune=RESCALED, rescale="feature_map"),
        )
        for n, m in _FASTER
    ),
    *(
        Setting(
            f"{n}:{m}, last fifth dense",
            SDGPConfig(n=n, m=m, prune=RESCALED),
            dense_last=0.2,
        )
        for n, m in ((1, 4), (2, 8))
    ),
)

# All functions at 2:4, the two magnitudes beyond it, and whole channels, as they are by default.
OVERVIEW = (
    DENSE,
    *(dataclasses.replace(s, name=f"{s.name}, 2:4") for s in (TABLE1[1], MVUE, TABLE1[2])),
    *_MAGNITUDES[1:],
    *(dataclasses.replace(s, name=f"{RESCALED}, {s.name}") for s in _RESCALED),
    *(s for s in PATTERNS if s.dense_last),
    *(s for s in CHANNELS if s.name in ("channels 2:4, magnitude", "channels 1:4, magnitude")),
)

RACE = (DENSE, *_MAGNITUDES, *_RESCALED, WHOLE_CHANNELS)
