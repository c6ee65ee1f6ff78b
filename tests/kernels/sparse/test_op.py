"""Test the operator sdgp::pruned_input_grad: arguments, strides, and what is multiplied densely."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels import reference
from sdgp_fx.kernels.sparse import op
from sdgp_fx.kernels.sparse.problem import Problem

from ...helpers.frames import deepest
from ...helpers.input_grads import SEED, channels_last, make_case

LAYERS = {
    "convolution": {"kernel": (3, 2), "size": (5, 4), "padding": 1, "stride": (1, 2), "groups": 2},
    "transposed": {
        "kernel": (3,),
        "size": (5,),
        "stride": 2,
        "transposed": True,
        "output_padding": 1,
    },
    "3d": {"kernel": (1, 2, 3), "size": (2, 3, 4), "padding": (0, 1, 1)},
    "matrices": {"kernel": (), "size": (), "batch": 5},
}


def layouts(case):
    """Yield the case with its gradient contiguous, channels-last, and with gaps."""
    x = case.grad_output
    yield case
    yield case.replace(grad_output=channels_last(x), weight=channels_last(case.weight))
    yield case.replace(grad_output=torch.stack([x, x], -1)[..., 0])


@pytest.mark.parametrize("prune", PRUNING_FUNCTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_opcheck(layer, prune):
    for case in layouts(make_case(6, 16, **LAYERS[layer])):
        arguments = case.arguments(2, 4, prune)
        torch.library.opcheck(torch.ops.sdgp.pruned_input_grad, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_opcheck_of_other_dtypes(dtype):
    for case in layouts(make_case(6, 16, (3, 3), (4, 5), dtype=dtype)):
        torch.library.opcheck(torch.ops.sdgp.pruned_input_grad, case.arguments())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides(layer, dtype):
    """The channels of the result are adjacent if those of the gradient are."""
    contiguous, last, gaps = layouts(make_case(6, 16, **LAYERS[layer], dtype=dtype))
    for case in (contiguous, gaps, last):
        result = op.PRUNED_INPUT_GRAD(*case.arguments())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            grad_output, *rest = case.arguments()
            fake = op.PRUNED_INPUT_GRAD(mode.from_tensor(grad_output), *rest)
        assert (fake.shape, fake.dtype, fake.stride()) == (
            result.shape, result.dtype, result.stride(),
        )  # fmt: skip
        expected = torch.empty(case.input_size)
        if case is last:
            expected = channels_last(expected)
        assert result.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("layer", LAYERS)
def test_other_dtypes_are_multiplied_densely(layer, dtype):
    for case in layouts(make_case(6, 16, **LAYERS[layer], dtype=dtype)):
        result = op.PRUNED_INPUT_GRAD(*case.arguments(1, 4, "mvue"))
        pruned = reference.prune_nm(case.grad_output, SEED, 1, 4, "mvue", "group")
        expected = case.input_grad(pruned, torch.float32 if dtype == torch.float16 else dtype)
        torch.testing.assert_close(result, expected.to(dtype), rtol=2e-3, atol=2e-2)


def test_calls_of_one_form_have_their_own_tensors_and_seeds():
    for seed in (torch.tensor([1]), torch.tensor([2])):
        case = make_case(6, 16, (3, 3), (5, 5), padding=1)
        result = op.PRUNED_INPUT_GRAD(*case.arguments(2, 4, "random", seed=seed))
        pruned = reference.prune_nm(case.grad_output, seed, 2, 4, "random", "group")
        torch.testing.assert_close(result, case.input_grad(pruned).float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="seed: expected one int64"):
        op.PRUNED_INPUT_GRAD(*case.arguments(2, 4, "random", seed=torch.tensor([1.0])))


def test_a_call_goes_through_few_frames():
    """The operator's own call, the kernel, what was prepared, and the search for a workspace."""
    arguments = make_case(6, 16, (3, 3), (7, 5)).arguments()
    op.PRUNED_INPUT_GRAD(*arguments)
    assert deepest(lambda: op.PRUNED_INPUT_GRAD(*arguments)) <= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_a_call_are_not_kept(dtype):
    case = make_case(6, 16, (3, 3), (7, 7), dtype=dtype)
    grad_output, weight, *settings = case.arguments()
    tensors = [grad_output.clone(), weight.clone()]
    references = [weakref.ref(tensor) for tensor in tensors]
    op.PRUNED_INPUT_GRAD(*tensors, *settings)
    del tensors
    assert [reference() for reference in references] == [None, None]


def test_there_is_no_derivative():
    case = make_case(6, 16, (3, 3), (5, 5))
    arguments = case.replace(weight=case.weight.requires_grad_()).arguments()
    with pytest.raises(RuntimeError, match="has no derivative"):
        op.PRUNED_INPUT_GRAD(*arguments)
    with torch.no_grad():
        op.PRUNED_INPUT_GRAD(*arguments)


def test_why_no_product():
    host = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert op.why_no_product(dtype, host) == ""
    for dtype in (torch.float16, torch.float64):
        assert op.why_no_product(dtype, host) == "dtype not supported by the sparse product"
    other = op.why_no_product(torch.float32, torch.device("meta"))
    assert other == "no sparse product for this device"


def test_the_weight_has_the_gradients_dtype():
    problem = Problem(*make_case(6, 16, (3, 3), (5, 5)).arguments())
    assert op.why_not_sparse(problem) == ""
    differs = op.why_not_sparse(problem._replace(weight=problem.weight.bfloat16()))
    assert differs == "the weight's dtype is not the gradient's"


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("grad_shape", "weight_shape", "input_size"),
    [
        ((0, 8, 3, 3), (8, 4, 3, 3), (0, 4, 5, 5)),
        ((2, 0, 3, 3), (0, 4, 3, 3), (2, 4, 5, 5)),
        ((2, 8, 0, 3), (8, 4, 3, 3), (2, 4, 2, 5)),
        ((2, 8, 3, 3), (8, 0, 3, 3), (2, 0, 5, 5)),
        ((0, 8), (8, 4), (0, 4)),
    ],
)
def test_zero_sized(grad_shape, weight_shape, input_size, last, nan_filled_empty):
    grad_output, weight = torch.randn(grad_shape), torch.randn(weight_shape)
    if last:
        grad_output = channels_last(grad_output)
    dims = len(grad_shape) - 2
    settings = (SEED, 2, 4, "magnitude", "group", input_size)
    layer = ([1] * dims, [0] * dims, [1] * dims, False, 1)
    result = op.PRUNED_INPUT_GRAD(grad_output, weight, *settings, *layer)
    assert torch.equal(result, torch.zeros(input_size))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 5}, "n: expected 1 <= n <= m = 4, got 5"),
        ({"prune": "best"}, "prune: expected one of"),
        ({"prune": "mvue", "seed": None}, "seed: expected one int64 .* got None"),
        ({"groups": 8}, "groups: expected .* a multiple of m = 4"),
        ({"groups": 2}, r"weight: expected one from 6 to 16 channels in 2 groups, got \(16, 6"),
        ({"transposed": True}, r"weight: expected one from 6 to 16 .* transposed=True"),
        (
            {"weight": torch.ones(6, 4, 3, 3), "transposed": True, "groups": 4},
            "groups: expected a divisor of the weight's 6 channels, got 4",
        ),
        ({"weight": torch.ones(16, 6, 3)}, r"weight: expected 4 sizes .* got \(16, 6, 3\)"),
        ({"input_size": (2, 6, 25)}, r"input_size: expected 4 sizes .* got \(2, 6, 25\)"),
        ({"stride": [1]}, r"stride: expected 2 sizes .* got \(1,\)"),
        ({"padding": []}, r"padding: expected 2 sizes .* got \(\)"),
        ({"dilation": [1, 1, 1]}, r"dilation: expected 2 sizes .* got \(1, 1, 1\)"),
        ({"grad_output": torch.ones(2, 16, 1, 1, 1, 1)}, "grad_output: .* three dimensions"),
    ],
)
def test_bad_arguments_are_refused(changes, words):
    call, arguments = bad_call(changes)
    with pytest.raises(ValueError, match=words):
        call(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match=words):
        call(**arguments | {"grad_output": mode.from_tensor(arguments["grad_output"])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": (3, 6, 5, 5)},
        {"input_size": (2, 6, 6, 5)},
        {"input_size": (2, 6, 5, 4)},
        {"stride": [1, 2]},
        {"stride": [0, 1]},
        {"padding": [1, 0]},
        {"padding": [-1, 0]},
        {"dilation": [1, 3]},
        {"dilation": [1, 0]},
    ],
)
def test_sizes_that_do_not_belong_together_are_refused(changes, dtype):
    call, arguments = bad_call(changes)
    arguments |= {name: arguments[name].to(dtype) for name in ("grad_output", "weight")}
    with pytest.raises(ValueError, match=r"input_size: expected one that gives \(2, 16, 3, 3\)"):
        call(**arguments)


def test_sizes_of_a_transposed_layer_that_do_not_belong_together_are_refused():
    case = make_case(6, 16, (3,), (5,), stride=2, transposed=True)
    for size in (4, 6, 7):
        with pytest.raises(ValueError, match="input_size: expected one that gives"):
            op.PRUNED_INPUT_GRAD(*case.replace(input_size=(2, 6, size)).arguments())


def bad_call(changes):
    """Return the operator, and good arguments with changes."""
    names = [argument.name for argument in op.PRUNED_INPUT_GRAD._schema.arguments]
    good = make_case(6, 16, (3, 3), (5, 5)).arguments()
    return op.PRUNED_INPUT_GRAD, dict(zip(names, good, strict=True)) | changes
