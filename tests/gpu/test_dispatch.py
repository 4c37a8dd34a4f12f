"""Prepared launches on the device: the self-test passes, and outputs have the bits of Triton's own launch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from gpu.cases import FamilyCase, family_cases
from torch import Tensor

from nsa_autotune import NSAConfig, nsa_attention
from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.pool import CompileOutcome
from nsa_autotune.codegen.render import render
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.plan import PreparedLaunch
from nsa_autotune.dispatch.self_test import failure, require_prepared_launches
from nsa_autotune.dispatch.triton_launch import CannotPrepareError
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import canonical_json

CASES = [case for case in family_cases() if case.kind != "random"]


def same(error: Exception) -> Exception:
    """Errors as they are."""
    return error


def moved(values: dict[str, Any]) -> dict[str, Any]:
    """Copies at other addresses, with the same strides."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def test_the_self_test_passes() -> None:
    assert failure(torch.cuda.current_device()) == ""
    require_prepared_launches()


@pytest.mark.parametrize("case", CASES, ids=[f"{number:03}-{case.name}" for number, case in enumerate(CASES)])
def test_a_prepared_launch_has_the_bits_of_tritons_own(case: FamilyCase, compiled: dict[str, CompileOutcome]) -> None:
    if compiled[canonical_json([case.family, case.problem.to_dict(), case.config])].status != "ok":
        pytest.skip("does not compile; test_families judges that")
    spec = get_spec(case.family)
    launch = load(render(spec, case.problem, case.config)).launch
    inputs = make_inputs(spec, case.problem, "cuda")
    given: dict[str, Any] = {}
    inputs.call(lambda **arguments: given.update(arguments))
    ordinary = Counter[str]()
    served = PreparedLaunch(launch, require_prepared_launches, ordinary, same)
    served(moved(given))
    prepared, wanted = moved(given), moved(given)
    served(prepared)
    launch(**wanted)
    outputs = [argument.name for argument in spec.arguments if argument.is_output and argument.name in given]
    assert outputs
    for name in outputs:  # a cache that is no fp8 has no scales
        bits, expected = (x[name].contiguous().view(torch.uint8) for x in (prepared, wanted))
        assert torch.equal(bits, expected), name
    assert not ordinary


def attend(dispatcher: Dispatcher, tensors: dict[str, Tensor]) -> Tensor:
    """A whole forward."""
    return nsa_attention(**tensors, config=NSAConfig(), dispatcher=dispatcher)


def make_tensors() -> dict[str, Tensor]:
    """Queries, keys, values and gates in bfloat16."""
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    tensors = {n: torch.randn(1, 512, h, 64, **like) for n, h in (("q", 16), ("k", 1), ("v", 1))}
    return {**tensors, "gates": torch.rand(1, 512, 16, 3, **like)}


def never() -> None:
    """Refuse to prepare."""
    raise CannotPrepareError("not wanted")


def test_attention_has_the_same_bits_on_streams_in_graphs_and_with_other_numbers() -> None:
    prepared, plain = Dispatcher(None), Dispatcher(None, trusted=never)
    first, second = make_tensors(), make_tensors()
    attend(prepared, first)
    wanted = attend(plain, second)
    assert torch.equal(attend(prepared, second), wanted)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = attend(prepared, second)
    torch.cuda.synchronize()
    assert torch.equal(on_side, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(prepared, second)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted)
    other = {"config": NSAConfig(), "scale": 0.5}
    assert torch.equal(
        nsa_attention(**second, **other, dispatcher=prepared), nsa_attention(**second, **other, dispatcher=plain)
    )
    assert not prepared.ordinary and set(plain.ordinary) == {"not wanted"}


def test_a_misaligned_query_has_the_same_bits() -> None:
    prepared, plain, tensors = Dispatcher(None), Dispatcher(None, trusted=never), make_tensors()
    attend(prepared, tensors)
    size = tensors["q"].numel()
    shifted = torch.empty(size + 1, device="cuda", dtype=torch.bfloat16)[1:].view(tensors["q"].shape)
    shifted.copy_(tensors["q"])
    assert torch.equal(attend(prepared, {**tensors, "q": shifted}), attend(plain, {**tensors, "q": shifted}))
    assert not prepared.ordinary
