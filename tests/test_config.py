import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdgp_fx import SDGPConfig
from sdgp_fx.config import (
    GRADIENTS,
    INNER_COMPILERS,
    LAYERS,
    PRUNING_FUNCTIONS,
    RESCALE_SCOPES,
    STRUCTURES,
    TARGETS,
)


def test_defaults_are_those_of_the_paper():
    config = SDGPConfig()
    assert (config.n, config.m) == (2, 4)
    assert (config.prune, config.rescale) == ("rescaled_magnitude", "group")
    assert (config.targets, config.inner) == (("conv",), "inductor")
    assert (config.structure, config.layers) == ("element", "all")
    assert (config.include, config.exclude, config.gradients) == (("*",), (), "backward")


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SDGPConfig().n = 1
    with pytest.raises(TypeError):
        SDGPConfig(1, 2)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 4), (3, 8), (16, 16), (32, 32)])
def test_valid_patterns(n, m):
    assert SDGPConfig(n=n, m=m).m == m


@pytest.mark.parametrize(
    ("options", "name", "expected", "got"),
    [
        ({"sdgp.n": 0}, "sdgp.n", "1 <= n <= sdgp.m = 4", "got 0"),
        ({"sdgp.n": 5}, "sdgp.n", "1 <= n <= sdgp.m = 4", "got 5"),
        ({"sdgp.n": -1}, "sdgp.n", "1 <= n", "got -1"),
        ({"sdgp.n": True}, "sdgp.n", "an int", "got True"),
        ({"sdgp.n": 2.0}, "sdgp.n", "an int", "got 2.0"),
        ({"sdgp.n": "2"}, "sdgp.n", "an int", "got '2'"),
        ({"sdgp.m": None}, "sdgp.m", "an int", "got None"),
        ({"sdgp.m": 6}, "sdgp.m", "power of two", "got 6"),
        ({"sdgp.m": 64}, "sdgp.m", "power of two from 1 to 32", "got 64"),
        ({"sdgp.m": 0}, "sdgp.m", "power of two", "got 0"),
        # An int of more than 4300 digits has no repr.
        ({"sdgp.n": 10**5000}, "sdgp.n", "1 <= n <= sdgp.m = 4", "got <int object"),
        ({"sdgp.m": 10**5000}, "sdgp.m", "power of two", "got <int object"),
        ({"sdgp.n": [10**5000]}, "sdgp.n", "an int", "got <list object"),
        ({"sdgp.prune": "topk"}, "sdgp.prune", "'random', 'magnitude'", "got 'topk'"),
        ({"sdgp.prune": 3}, "sdgp.prune", "'mvue'", "got 3"),
        ({"sdgp.prune": None}, "sdgp.prune", "'mvue'", "got None"),
        ({"sdgp.rescale": "layer"}, "sdgp.rescale", "'group', 'feature_map'", "got 'layer'"),
        ({"sdgp.structure": "row"}, "sdgp.structure", "'element', 'channel'", "got 'row'"),
        ({"sdgp.structure": "channel_always"}, "sdgp.structure", "'element', 'channel'", "got"),
        ({"sdgp.structure": np.zeros(3)}, "sdgp.structure", "'element', 'channel'", "got array"),
        ({"sdgp.structure": None}, "sdgp.structure", "'element', 'channel'", "got None"),
        ({"sdgp.layers": "some"}, "sdgp.layers", "'all', 'profitable'", "got 'some'"),
        ({"sdgp.layers": True}, "sdgp.layers", "'all', 'profitable'", "got True"),
        ({"sdgp.targets": "attention"}, "sdgp.targets", "'conv'", "got 'attention'"),
        ({"sdgp.targets": "conv,foo"}, "sdgp.targets", "'conv', 'linear'", "got 'conv,foo'"),
        ({"sdgp.targets": ""}, "sdgp.targets", "'conv', 'linear', 'conv,linear'", "got ''"),
        ({"sdgp.targets": []}, "sdgp.targets", "'conv', 'linear', 'conv,linear'", "got []"),
        ({"sdgp.targets": True}, "sdgp.targets", "'conv', 'linear'", "got True"),
        ({"sdgp.targets": None}, "sdgp.targets", "'conv', 'linear'", "got None"),
        ({"sdgp.gradients": "forward"}, "sdgp.gradients", "'backward', 'all'", "got 'forward'"),
        ({"sdgp.gradients": None}, "sdgp.gradients", "'backward', 'all'", "got None"),
        ({"sdgp.inner": "eager"}, "sdgp.inner", "'inductor', 'aot_eager'", "got 'eager'"),
        ({"sdgp.exclude": 7}, "sdgp.exclude", "glob patterns", "got 7"),
        ({"sdgp.include": ["a", 1]}, "sdgp.include", "glob patterns", "got ['a', 1]"),
        ({"sdgp.N": 2}, "sdgp.N", "sdgp.n, sdgp.m", "unknown name"),
    ],
)
def test_errors_name_option_expectation_and_value(options, name, expected, got):
    with pytest.raises(ValueError, match=r"^sdgp") as error:
        SDGPConfig.from_options(options, environ={})
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert expected in message
    assert got in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("conv", ("conv",)),
        ("conv,linear", ("conv", "linear")),
        ("linear, conv", ("conv", "linear")),
        (["conv"], ("conv",)),
        (("linear", "conv"), ("conv", "linear")),
        (["linear", "linear"], ("linear",)),
    ],
)
def test_targets_are_a_tuple_in_one_order(value, expected):
    assert SDGPConfig(targets=value).targets == expected
    assert SDGPConfig.from_options({"sdgp.targets": value}, environ={})[0].targets == expected
    text = value if isinstance(value, str) else ",".join(value)
    assert SDGPConfig.from_options(environ={"SDGP_TARGETS": text})[0].targets == expected


@pytest.mark.parametrize(
    ("structure", "prune"), [("element", "rescaled_magnitude"), ("channel", "magnitude")]
)
def test_default_of_prune_is_the_structures(structure, prune):
    other = "mvue"
    key, variable = {"sdgp.structure": structure}, {"SDGP_STRUCTURE": structure}
    for options, environ in ((key, {}), ({}, variable), (key, {"SDGP_PRUNE": ""})):
        assert SDGPConfig.from_options(options, environ)[0].prune == prune
    for options, environ in (
        ({**key, "sdgp.prune": other}, {}),
        (key, {"SDGP_PRUNE": other}),
        ({"sdgp.prune": other}, variable),
        ({}, {**variable, "SDGP_PRUNE": other}),
    ):
        assert SDGPConfig.from_options(options, environ)[0].prune == other
    config = SDGPConfig(structure=structure)
    assert config == SDGPConfig(structure=structure, prune=None)
    assert config == SDGPConfig(structure=structure, prune=prune)
    assert repr(config) == repr(SDGPConfig(structure=structure, prune=prune))
    # A resolved default is a value like any other.
    for replaced in STRUCTURES:
        assert dataclasses.replace(config, structure=replaced).prune == prune
        again = dataclasses.replace(config, structure=replaced, prune=None)
        assert again == SDGPConfig(structure=replaced)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_strings_of_numpy_reach_generated_code_as_plain_ones(inner):
    """Their repr, "np.str_('magnitude')", is not valid in generated code."""
    options = {
        "sdgp.prune": np.str_("magnitude"),
        "sdgp.rescale": np.str_("channel"),
        "sdgp.targets": np.str_("conv"),
        "sdgp.inner": np.str_(inner),
    }
    config, _ = SDGPConfig.from_options(options, environ={})
    assert repr(config) == repr(SDGPConfig(prune="magnitude", rescale="channel", inner=inner))


def test_other_options_are_handed_on():
    config, rest = SDGPConfig.from_options({"sdgp.m": 8, "max_autotune": True}, environ={})
    assert config.m == 8
    assert rest == {"max_autotune": True}


def test_the_callers_options_are_not_changed():
    options = {"sdgp.m": 8, "max_autotune": True}
    SDGPConfig.from_options(options, environ={})
    assert options == {"sdgp.m": 8, "max_autotune": True}


def test_environment_fills_in_and_options_win():
    environ = {"SDGP_N": "1", "SDGP_M": "8", "SDGP_PRUNE": "mvue", "SDGP_EXCLUDE": "stem.*, head"}
    config, _ = SDGPConfig.from_options({"sdgp.n": 3}, environ)
    assert config == SDGPConfig(n=3, m=8, prune="mvue", exclude=("stem.*", "head"))


def test_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("SDGP_INNER", "aot_eager")
    assert SDGPConfig.from_options()[0].inner == "aot_eager"


def test_empty_variable_counts_as_unset():
    assert SDGPConfig.from_options(environ={"SDGP_N": ""})[0].n == 2


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SDGP_N": "two"}, ["SDGP_N", "an int", "'two'"]),
        ({"SDGP_N": "9"}, ["sdgp.n", "got 9", "SDGP_N=9"]),
        ({"SDGP_PRUNE": "best"}, ["sdgp.prune", "'best'", "SDGP_PRUNE=best"]),
    ],
)
def test_environment_errors_name_the_variable(environ, words):
    with pytest.raises(ValueError, match="expected") as error:
        SDGPConfig.from_options(environ=environ)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("variable", "close"),
    [
        ("SDGP_TARGET", "SDGP_TARGETS"),
        ("SDGP_target", "SDGP_TARGETS"),
        ("sdgp_n", "SDGP_N"),
        ("SDGPEXCLUDE", "SDGP_EXCLUDE"),
        ("SDGP_NO_SUCH", ""),
    ],
)
def test_an_unknown_variable_warns(variable, close):
    with pytest.warns(UserWarning, match=variable) as caught:
        config, _ = SDGPConfig.from_options(environ={variable: "linear", "SDGP_M": "8"})
    assert config == SDGPConfig(m=8)
    (warning,) = caught
    assert str(warning.message).partition("close to it: ")[2].partition(",")[0] == close


def test_no_known_variable_warns():
    names = [field.name for field in dataclasses.fields(SDGPConfig)]
    environ = {f"SDGP_{name.upper()}": "" for name in names} | {"PATH": "/", "SDG": "1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SDGPConfig.from_options(environ=environ) == (SDGPConfig(), {})


def test_has_rules():
    assert not SDGPConfig().has_rules
    assert not SDGPConfig(include="*", exclude="").has_rules
    for rules in ({"include": "a"}, {"include": "*,a"}, {"include": ()}, {"exclude": "a"}):
        assert SDGPConfig(**rules).has_rules


def test_include_and_exclude_are_globs():
    config = SDGPConfig(include="layer*,stem", exclude=["layer4.*", "*.downsample.?"])
    assert config.selects("stem")
    assert config.selects("layer1.0.conv1")
    assert not config.selects("head")
    assert not config.selects("layer4.0.conv1")
    assert not config.selects("layer2.0.downsample.0")


def test_include_and_exclude_match_names_as_they_are():
    """A name may have characters that mean something else in a pattern."""
    config = SDGPConfig(exclude=["d.g[0]"])
    assert not config.selects("d.g[0]")
    assert config.selects("d.g[1]")


def test_repr_tells_configs_apart():
    """The key of Inductor's caches is made from the repr."""
    assert repr(SDGPConfig()) != repr(SDGPConfig(n=1))
    assert repr(SDGPConfig()) != repr(SDGPConfig(structure="channel"))
    assert repr(SDGPConfig()) != repr(SDGPConfig(layers="profitable"))
    assert repr(SDGPConfig()) != repr(SDGPConfig(gradients="all"))
    assert repr(SDGPConfig(exclude="a")) == repr(SDGPConfig(exclude=("a",)))


# Any options, any environment

CHOICES = {
    "prune": PRUNING_FUNCTIONS,
    "rescale": RESCALE_SCOPES,
    "structure": STRUCTURES,
    "layers": LAYERS,
    "gradients": GRADIENTS,
    "inner": INNER_COMPILERS,
}
KINDS = (*TARGETS, "conv,linear", "linear, conv", ",conv,,")
texts = st.text() | st.text(alphabet="*?[]!,.sdgp \t\n\0")
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([np.int64(2), np.float32(4), np.bool_(True), np.zeros(3), int]),
        st.just(5000).map(lambda digits: 10**digits),
        st.floats(),
        texts,
        texts.map(np.str_),
        st.binary(),
        st.builds(object),
    ),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(texts, inner),
    max_leaves=4,
)
valid = {
    "n": st.integers(1, 4),
    "m": st.sampled_from([4, 8, 32]),
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    "targets": st.sampled_from(KINDS) | st.lists(st.sampled_from(TARGETS), min_size=1),
    "include": texts | st.lists(texts),
    "exclude": texts | st.tuples(texts),
}


def mappings(form, invalid):
    """Draw some of the fields, keyed by form: a valid value for each, or one of invalid."""
    either = {form(name): strategy | invalid for name, strategy in valid.items()}
    all_valid = {form(name): strategy for name, strategy in valid.items()}
    return st.fixed_dictionaries({}, optional=all_valid) | st.fixed_dictionaries(
        {}, optional=either
    )


OURS = mappings("sdgp.{}".format, values)
OTHERS = st.dictionaries(texts | texts.map("sdgp.{}".format) | st.binary() | st.integers(), values)
ENVIRONMENT = mappings(lambda name: f"SDGP_{name.upper()}", texts).map(
    lambda environ: {
        key: ",".join(value) if isinstance(value, (list, tuple)) else str(value)
        for key, value in environ.items()
    }
)


def is_ours(key):
    return isinstance(key, str) and key.startswith("sdgp.")


def kinds(value):
    """Return the parts of sdgp.targets; none if it is neither a string nor a sequence of them."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, (list, tuple)) else []


def fits(name, value, m):
    """Return whether a field may have this value with this m."""
    if name in ("n", "m"):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return is_int and (value in (1, 2, 4, 8, 16, 32) if name == "m" else 1 <= value <= m)
    if name in CHOICES:
        return isinstance(value, str) and value in CHOICES[name]
    if name == "targets":
        return bool(kinds(value)) and all(kind in TARGETS for kind in kinds(value))
    if isinstance(value, (list, tuple)):
        return name in valid and all(isinstance(part, str) for part in value)
    return name in valid and isinstance(value, str)


def refused(options):
    """Return the options one of which an error must name; n also if it is not given."""
    settings = {"sdgp.n": 2, "sdgp.m": 4, **options}
    m = settings["sdgp.m"]
    m = m if fits("m", m, m) else 32
    bad = [key for key, value in settings.items() if not fits(key.removeprefix("sdgp."), value, m)]
    whole_channels = options.get("sdgp.structure") == "channel"
    if not bad and whole_channels and options.get("sdgp.rescale", "group") != "group":
        return ["sdgp.rescale"]
    return bad


def outcome(options, environ):
    """Return the config, the other options, and the message of a ValueError."""
    try:
        return *SDGPConfig.from_options(options, environ), ""
    except ValueError as error:
        return None, None, str(error)


@given(OURS, OTHERS)
def test_any_options_are_read_or_refused(ours, others):
    options = {**others, **ours}
    ours = {key: value for key, value in options.items() if is_ours(key)}
    bad = refused(ours)
    config, rest, message = outcome(options, {})
    if config is None:
        assert any(message.startswith(f"{key}: expected ") for key in bad)
        return
    assert not bad
    assert rest.keys() == {key for key in options if not is_ours(key)}
    assert all(rest[key] is options[key] for key in rest)
    fields = dataclasses.asdict(config)
    assert SDGPConfig(**fields) == config
    for key, value in ours.items():
        if isinstance(value, str) and key in ("sdgp.include", "sdgp.exclude"):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif key == "sdgp.targets":
            value = [kind for kind in TARGETS if kind in kinds(value)]
        read = fields[key.removeprefix("sdgp.")]
        assert read == (tuple(value) if isinstance(value, list) else value)


@given(OURS, ENVIRONMENT)
def test_any_environment_is_read_as_options_or_refused(options, environ):
    config, _, message = outcome(options, environ)
    read = {f"sdgp.{key.removeprefix('SDGP_').lower()}": text for key, text in environ.items()}
    read = {key: text for key, text in read.items() if text and key not in options}
    for name in ("n", "m"):
        if (text := read.get(f"sdgp.{name}")) is None:
            continue
        try:
            read[f"sdgp.{name}"] = int(text)
        except ValueError:
            assert message == f"SDGP_{name.upper()}: expected an int, got {text!r}"
            return
    expected, _, its_message = outcome({**read, **options}, {})
    assert config == expected
    assert message.startswith(its_message)
    for key in read:
        assert config or f"SDGP_{key.removeprefix('sdgp.').upper()}=" in message
