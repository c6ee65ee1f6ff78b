"""Settings of the pass, checked, from a backend's options and from the environment."""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

PRUNING_FUNCTIONS = ("random", "magnitude", "rescaled_magnitude", "mvue")
RESCALE_SCOPES = ("group", "feature_map", "channel")
STRUCTURES = ("element", "channel")
LAYERS = ("all", "profitable")
PRODUCTS = ("auto", "dense", "sparse")
TARGETS = ("conv", "linear")
GRADIENTS = ("backward", "all")
INNER_COMPILERS = ("inductor", "aot_eager")
_CHOICES = {
    "prune": PRUNING_FUNCTIONS,
    "rescale": RESCALE_SCOPES,
    "structure": STRUCTURES,
    "layers": LAYERS,
    "product": PRODUCTS,
    "gradients": GRADIENTS,
    "inner": INNER_COMPILERS,
}
_DEFAULT_PRUNE = {"element": "rescaled_magnitude", "channel": "magnitude"}
MAX_M = 32

_PREFIX = "sdgp."


def check_pattern(n: Any, m: Any, prefix: str = "") -> None:
    """Check that 1 <= n <= m <= 32 and that m is a power of two.

    Args:
        prefix: Written before the option's name in the message.

    Raises:
        ValueError: They are not.
    """
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{prefix}{name}: expected an int, got {_shown(value)}")
    if not 1 <= m <= MAX_M or m & (m - 1):
        raise ValueError(f"{prefix}m: expected a power of two from 1 to {MAX_M}, got {_shown(m)}")
    if not 1 <= n <= m:
        raise ValueError(f"{prefix}n: expected 1 <= n <= {prefix}m = {m}, got {_shown(n)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check that value is one of choices.

    Args:
        name: The option's name, for the message.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {listed}, got {_shown(value)}")


def matches(module_name: str, glob: str) -> bool:
    """Return whether a pattern of include or exclude is this name, or matches it.

    A name may have characters with a meaning in patterns, as "d.a[0]".
    """
    return module_name == glob or fnmatchcase(module_name, glob)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDGPConfig:
    """What is pruned, and how (McDanel et al. 2022, section III-B).

    Attributes:
        n, m: Of every m consecutive output channels n keep a nonzero gradient;
            1 <= n <= m <= 32, m a power of two. n = m prunes nothing.
        prune: "random", "magnitude", "rescaled_magnitude" or "mvue". By default
            "rescaled_magnitude", with structure="channel" "magnitude"; `dataclasses.replace` with
            another structure takes prune=None for that structure's default.
        rescale: "group", "feature_map" or "channel": over what "rescaled_magnitude" keeps the
            L1 norm. The other functions don't read it.
        structure: "element", as in the paper, or "channel": whole channels of the batch, by their
            L1 norm, with "group" as their only scope.
        layers: "all" that can be pruned, or "profitable": those in which pruning is expected to
            save time, by a rule on shapes and device.
        product: What multiplies pruned elements: "dense", the library's product; "sparse", one that
            skips the zeros, where there is one; or "auto", whichever is expected to be faster.
            The numbers are the same up to rounding.
        targets: The kinds of layers, "conv", "linear" or both, one string with commas or a
            sequence of strings.
        include, exclude: Glob patterns over module names as `named_modules()` gives them, one
            string with commas or a sequence of strings. A layer is pruned if a pattern of
            include matches its name and none of exclude does.
        gradients: "backward", what `loss.backward()` computes, or "all": also gradients that the
            compiled function itself takes, as with `torch.func.grad`.
        inner: "inductor" or "aot_eager", the compiler that gets the rewritten graph.

    Raises:
        ValueError: An option has another value or type; the message names it.
    """

    n: int = 2
    m: int = 4
    prune: str = None  # type: ignore[assignment]  # The structure's default.
    rescale: str = "group"
    structure: str = "element"
    layers: str = "all"
    product: str = "auto"
    targets: str | Iterable[str] = ("conv",)
    include: str | Iterable[str] = ("*",)
    exclude: str | Iterable[str] = ()
    gradients: str = "backward"
    inner: str = "inductor"

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m, _PREFIX)
        check_choice(f"{_PREFIX}structure", self.structure, STRUCTURES)
        if self.prune is None:
            object.__setattr__(self, "prune", _DEFAULT_PRUNE[self.structure])
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            check_choice(f"{_PREFIX}{name}", value, choices)
            # A plain str, as it is written into code: numpy's has another repr.
            object.__setattr__(self, name, choices[choices.index(value)])
        object.__setattr__(self, "targets", _targets(self.targets))
        if self.structure == "channel" and self.rescale != "group":
            raise ValueError(
                f"{_PREFIX}rescale: expected 'group' with {_PREFIX}structure = "
                f"{self.structure!r}, got {self.rescale!r}"
            )
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(f"{_PREFIX}{name}", getattr(self, name)))

    def selects(self, module_name: str) -> bool:
        """Return whether include and exclude let the module of this name be pruned."""
        return any(matches(module_name, glob) for glob in self.include) and not any(
            matches(module_name, glob) for glob in self.exclude
        )

    @property
    def has_rules(self) -> bool:
        """Whether include and exclude leave anything out."""
        return self.include != ("*",) or bool(self.exclude)

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> tuple[SDGPConfig, dict[str, Any]]:
        """Read `torch.compile`'s options, and the environment where they are silent.

        Args:
            options: "sdgp.n" and so on for the fields of this class, other keys for Inductor.
            environ: os.environ by default; SDGP_N and so on. An empty variable counts as unset.

        Returns:
            The config, and the options that are not ours.

        Raises:
            ValueError: There is an unknown "sdgp." key, or a value that the class refuses.
        """
        environ = os.environ if environ is None else environ
        _warn_of_unknown_variables(environ)
        fields = [field.name for field in dataclasses.fields(cls)]
        known = [f"{_PREFIX}{name}" for name in fields]
        options = dict(options or {})
        ours = {key: options.pop(key) for key in list(options) if str(key).startswith(_PREFIX)}
        for key in ours:
            if key not in known:
                raise ValueError(f"{key}: expected one of {', '.join(known)}, got an unknown name")

        values: dict[str, Any] = {}
        variables = []
        for name in fields:
            variable = f"SDGP_{name.upper()}"
            if f"{_PREFIX}{name}" in ours:
                values[name] = ours[f"{_PREFIX}{name}"]
            elif text := environ.get(variable, ""):
                values[name] = _integer(variable, text) if name in ("n", "m") else text
                variables.append(f"{variable}={text}")
        try:
            if "prune" in values:  # The class takes None for its default; an option is a name.
                check_choice(f"{_PREFIX}prune", values["prune"], PRUNING_FUNCTIONS)
            return cls(**values), options
        except ValueError as error:
            if not variables:
                raise
            raise ValueError(f"{error} (the environment has {', '.join(variables)})") from None


def _warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    """Warn of variables that are ours by their names, but none that we read."""
    known = [f"SDGP_{field.name.upper()}" for field in dataclasses.fields(SDGPConfig)]
    for variable in environ:
        upper = variable.upper()
        if not upper.startswith("SDGP") or variable in known:
            continue
        close = difflib.get_close_matches(upper, known, 3, cutoff=0.75)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        warnings.warn(
            f"{variable}: expected one of {', '.join(known)}, got an unknown name, which is "
            f"ignored{hint}",
            stacklevel=4,
        )


def _integer(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable}: expected an int, got {text!r}") from None


def _globs(name: str, value: Any) -> tuple[str, ...]:
    parts = _split(value)
    if parts is None:
        raise ValueError(
            f"{name}: expected glob patterns, one string with commas or a list of strings, "
            f"got {_shown(value)}"
        )
    return parts


def _targets(value: Any) -> tuple[str, ...]:
    """Return the kinds of layers in the order of TARGETS."""
    parts = _split(value)
    if not parts or not set(parts) <= set(TARGETS):
        choices = ", ".join(map(repr, (*TARGETS, ",".join(TARGETS))))
        raise ValueError(f"{_PREFIX}targets: expected one of {choices}, got {_shown(value)}")
    return tuple(kind for kind in TARGETS if kind in parts)


def _split(value: Any) -> tuple[str, ...] | None:
    """Return the parts of a string with commas, or of a list of strings; None for anything else."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
        return None
    return tuple(value)


def _shown(value: Any) -> str:
    """Return repr(value), or the default one where that fails, as for an int of 5000 digits."""
    try:
        return repr(value)
    except Exception:
        return object.__repr__(value)
