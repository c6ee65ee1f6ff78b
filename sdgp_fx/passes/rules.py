"""Find patterns of `sdgp.include` and `sdgp.exclude` that match no layer, and what is close."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator

from ..config import SDGPConfig, matches
from .module_names import ModuleNames, is_in


def unmatched_patterns(config: SDGPConfig, names: ModuleNames) -> list[str]:
    """Say which patterns match no module that could be a layer, whatever graph that is in."""
    if not config.has_rules or not names.is_complete:
        return []
    possible = (*names.layers, *names.others)
    return [
        _message(option, pattern, names.layers)
        for option, pattern in _patterns(config)
        if not any(matches(name, pattern) for name in possible)
    ]


def patterns_above_layers(
    config: SDGPConfig, names: ModuleNames, decided: Collection[str]
) -> list[str]:
    """Say which patterns match modules with layers in them, and none of these.

    Args:
        decided: The names of all layers of a graph. Any module may multiply by itself, so that the
            names of modules alone don't tell.
    """
    return [
        _message(option, pattern, names.layers)
        for option, pattern in _patterns(config)
        if not any(matches(name, pattern) for name in (*names.layers, *decided))
        and any(
            is_in(name, module)
            for module in names.others
            if matches(module, pattern)
            for name in decided
        )
    ]


def _patterns(config: SDGPConfig) -> Iterator[tuple[str, str]]:
    for option in ("include", "exclude"):
        for pattern in getattr(config, option):
            yield f"sdgp.{option}", pattern


def _message(option: str, pattern: str, names: Iterable[str]) -> str:
    close = _close(pattern, names)
    hint = f"; close to it: {', '.join(map(repr, close))}" if close else ""
    return f"{option}: {pattern!r} matches no layer{hint}"


def _close(pattern: str, names: Iterable[str]) -> list[str]:
    """Return names, and patterns that match some, which are close to a pattern that doesn't."""
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        candidates |= dict.fromkeys(f"{'.'.join(parts[:i])}.*" for i in range(1, len(parts)))
        if pattern.startswith("*"):
            candidates |= dict.fromkeys(f"*.{part}.*" for part in parts[1:-1])
            candidates |= dict.fromkeys(f"*.{'.'.join(parts[i:])}" for i in range(1, len(parts)))
        candidates[name] = None
    if f"{pattern}.*" in candidates:
        return [f"{pattern}.*"]
    return difflib.get_close_matches(pattern, candidates, 2)
