"""Every family: its data is consistent, and its kernels are right and stay inside their tensors (in the interpreter).

bfloat16 is left to tests/gpu: the interpreter multiplies it wrongly. Shapes are tiny: interpretation takes milliseconds
for each program and tile.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu.watcher import OutOfBounds, watched
from problems import served

from nsa_autotune.bench.accuracy import check_variant
from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.codegen.golden import structural_configs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.paths import template_dir
from nsa_autotune.codegen.render import render
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidProblem, UnknownName
from nsa_autotune.kernels import PIPELINE, all_specs, get_spec
from nsa_autotune.spec import Config, KernelSpec, Problem

SPECS = all_specs()
FAMILIES = tuple(SPECS)
TRAINING = tuple(family for family in FAMILIES if "batched" in SPECS[family].layouts)
APPENDING = ("kv_append_fwd", "cmp_pool_append_fwd", "cmp_mlp_append_fwd")  # the sequence's length is nothing to them
NO_LONGER = ("slc_win_decode_fwd", *APPENDING)  # reads as many tokens of a long sequence as of a longer one
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
GROUPS = (1, 2, 4, 5, 8, 16, 64)
SMALL = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected=4, window_size=20)
SHORT_Q = Problem(
    batch=1,
    seq_q=19,
    seq_k=90,
    num_q_heads=4,
    num_kv_heads=1,
    d_qk=32,
    d_v=16,
    dtype="float16",
    locality=0.5,
    phi_hidden=16,
    nsa=SMALL,
)
PACKED = SHORT_Q.replace(batch=4, layout="packed", num_q_heads=3, d_qk=48, seq_q=36, seq_k=80)
DEFAULT_CASES = {
    "two_batches_and_heads": SHORT_Q.replace(batch=2, seq_q=13, seq_k=13, num_q_heads=4, num_kv_heads=2),
    "float32_group_of_5": SHORT_Q.replace(num_q_heads=5, seq_q=17, seq_k=83, d_qk=48, d_v=32, dtype="float32"),
    "one_token": SHORT_Q.replace(seq_q=1, seq_k=1),
    "one_query": SHORT_Q.replace(seq_q=1, seq_k=70),
    "d192_128": SHORT_Q.replace(seq_q=9, seq_k=41, d_qk=192, d_v=128, num_q_heads=2),
    "no_overlap_odd_n": SHORT_Q.replace(
        nsa=NSAConfig(16, 16, select_block_size=16, num_selected=5, num_local=1, window_size=16)
    ),
    "wide_overlap": SHORT_Q.replace(
        nsa=NSAConfig(32, 8, select_block_size=32, num_selected=6, window_size=33), seq_q=12, seq_k=170
    ),
    "one_block": SHORT_Q.replace(
        nsa=NSAConfig(8, 4, select_block_size=16, num_selected=1, num_initial=0, num_local=1, window_size=1)
    ),
    "packed_two_heads": PACKED.replace(num_q_heads=4, num_kv_heads=2, seq_q=28, seq_k=28, dtype="float32"),
}


def small_tiles(spec: KernelSpec, problem: Problem, config: Config) -> Config:
    """The config with key tiles of 16 and short sorts, where that is legal: more loop turns, faster interpretation."""
    for name in ("BLOCK_N", "BLOCK_J", "BLOCK_C", "BLOCK_TOP"):
        for value in next((param.values for param in spec.params if param.name == name), ()):
            changed = {**config, name: value}
            if spec.broken_constraint(problem, changed) is None:
                config = changed
                break
    return config


def switches(spec: KernelSpec, config: Config) -> str:
    """The structural values, as a test's name."""
    values = {param.name: config[param.name] for param in spec.params if param.structural}
    on = [name if value is True else str(value) for name, value in values.items() if value is not False]
    return "-".join(on) or "plain"


def structures(problem: Problem) -> list[Any]:
    """Each two structural switches of every family with all values that they may take together."""
    found = []
    for family in TRAINING:
        spec = SPECS[family]
        for config in structural_configs(spec, problem):
            config = small_tiles(spec, problem, config)
            found.append(pytest.param(family, config, id=f"{family}-{switches(spec, config)}"))
    return found


def grid() -> list[Problem]:
    """Head dims, groups, dtypes and layouts that a default must serve."""
    return [
        Problem(num_q_heads=4 * g, num_kv_heads=4, d_qk=d_qk, d_v=d_v, dtype=dtype, layout=layout)
        for (d_qk, d_v), g, dtype, layout in itertools.product(
            DIMS, GROUPS, ("bfloat16", "float16", "float32"), ("batched", "packed")
        )
    ]


def check(spec: KernelSpec, problem: Problem, config: Config) -> None:
    """Run the variant under the watcher and compare its outputs with the reference."""
    with watched(load(render(spec, problem, config))) as (watcher, launch):
        report = check_variant(spec, problem, launch, "cpu")
    assert report.ok, report.reason
    assert watcher.checked > 0


# the specs as data


def test_the_families_come_in_pipeline_order() -> None:
    assert FAMILIES[: len(PIPELINE)] == PIPELINE
    with pytest.raises(UnknownName, match="Did you mean win_attn_fwd"):
        get_spec("win_atn_fwd")


def text_of(template: str) -> str:
    """A template and the macro files that it imports."""
    text = (template_dir() / template).read_text(encoding="utf-8")
    return text + "".join(text_of(name) for name in re.findall(r'import "(.+?)"', text))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spec_has_a_template_and_all_it_names_is_used(family: str) -> None:
    spec = SPECS[family]
    source = text_of(spec.template)
    problem = served(spec, SHORT_Q.replace(nsa=NSAConfig()))
    config = spec.default_config(problem)
    constants, structure = spec.constants(problem, config), spec.structure(problem, config)
    for param in spec.params:
        name = param.name
        used = name in constants or name in structure or name in ("num_warps", "num_stages", "maxnreg")
        named = any(f'{table}["{name}"]' in source for table in ("CONFIG", "config"))  # read by launch, or filled in
        assert used or named, f"{name} changes nothing"
        assert param.structural == (name in structure), f"{name}: structural ones, and only they, decide lines"
        assert param.doc and len(set(param.values)) == len(param.values) > 1
        assert not any(isinstance(value, float) for value in param.values)
    for argument in spec.arguments:
        assert f"{argument.name}," in source or f"{argument.name}=None" in source
    assert sum(argument.is_output for argument in spec.arguments) >= 1
    assert spec.doc and spec.cases


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_has_a_reason_and_can_be_broken_or_met(family: str) -> None:
    spec = SPECS[family]
    for constraint in spec.constraints:
        assert len(constraint.reason) > 20 and not constraint.reason.endswith(".")
    problems = [
        Problem(nsa=NSAConfig(32, 2, 256, num_selected=64)),
        Problem(d_qk=256, d_v=256, dtype="float32", num_kv_heads=64, phi_hidden=256),
        Problem(d_qk=96, d_v=96),
    ]
    if spec.layouts == ("paged",):
        wide = problems[1].replace(num_kv_heads=1, nsa=NSAConfig(num_selected=4))
        problems = [problem.replace(layout="paged", seq_q=8) for problem in problems]
        problems.append(wide.replace(layout="paged", seq_q=2))
    names = [param.name for param in spec.params]
    wider = {"num_warps": (2, 16), "BLOCK_T": (1, 2, 128)}  # 16 warps: what the rule on registers is there for
    ends = {param.name: (param.values[0], param.values[-1]) for param in spec.params}
    ends |= {param.name: param.values for param in spec.params if param.name == "loop_order"}
    choices = [wider.get(name, values) for name, values in ends.items()]
    never_broken = {constraint.reason for constraint in spec.constraints}
    for problem in problems:
        for values in itertools.product(*choices):
            config = dict(zip(names, values, strict=True))
            never_broken -= {c.reason for c in spec.constraints if not c.holds(problem, config)}
    assert not never_broken  # a rule that holds for all is no rule


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_legal_for_every_head_dim_group_dtype_and_layout(family: str) -> None:
    spec = SPECS[family]
    for problem in (served(spec, problem) for problem in grid()):
        config = spec.default_config(problem)
        assert set(config) == {param.name for param in spec.params}
        assert config.get("use_tma", False) is False  # works before sm_90 too


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "nsa",
    [
        NSAConfig(8, 4, 16),
        NSAConfig(16, 16, 16, num_selected=3),
        NSAConfig(64, 16, 64, num_selected=64),
        NSAConfig(32, 2, 256),
        NSAConfig(2, 2, 256, num_selected=33),
    ],
    ids=lambda nsa: f"{nsa.compress_block_size}-{nsa.compress_stride}-{nsa.select_block_size}-{nsa.num_selected}",
)
def test_defaults_are_legal_for_other_constants(family: str, nsa: NSAConfig) -> None:
    spec = SPECS[family]
    for dtype, dim in itertools.product(("bfloat16", "float32"), (64, 256)):
        spec.default_config(served(spec, Problem(nsa=nsa, dtype=dtype, d_qk=dim, d_v=dim)))


@pytest.mark.parametrize("hidden", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_default_of_phi_is_legal_for_every_width(hidden: int, dtype: str) -> None:
    for dim, _ in DIMS:
        SPECS["cmp_mlp_fwd"].default_config(Problem(phi_hidden=hidden, d_qk=dim, d_v=dim, dtype=dtype))


@pytest.mark.parametrize(
    ("family", "problem", "words"),
    [
        ("cmp_attn_fwd", Problem(d_qk=24), "head dims must be multiples of 16"),
        ("cmp_pool_fwd", Problem(d_qk=240), "a sum of at most three powers of two"),
        ("cmp_mlp_fwd", Problem(phi_hidden=96), "phi_hidden must be a power of two"),
        ("slc_attn_fwd", Problem(nsa=NSAConfig(select_block_size=48)), "select_block_size (l') must be a power of two"),
        ("slc_select_fwd", Problem(nsa=NSAConfig(num_selected=65)), "num_selected (n) must be at most 64"),
        ("slc_select_fwd", Problem(nsa=NSAConfig(1, 1, 256)), "l'/d must be a power of two of at most 128"),
    ],
    ids=lambda value: value if isinstance(value, str) and "_fwd" in value else "",
)
def test_a_problem_beyond_a_family_is_refused_with_the_rule(family: str, problem: Problem, words: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        SPECS[family].default_config(problem)
    assert words in str(caught.value) and str(caught.value).startswith(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_buckets_lengths_and_names_only_what_matters(family: str) -> None:
    spec = SPECS[family]
    base = served(spec, Problem(batch=3, seq_q=5000, seq_k=5000, locality=0.5))
    longer, shorter = (served(spec, base.replace(seq_q=n, seq_k=n)) for n in (8192, 4096))
    if base.layout == "paged":
        longer, shorter = (base.replace(seq_k=n) for n in (8192, 4096))
    key = spec.problem_key(base)
    assert key == spec.problem_key(longer.replace(batch=4))
    assert (key != spec.problem_key(shorter)) is (family not in APPENDING)
    assert key != spec.problem_key(base, bucket=False)
    assert key == spec.problem_key(Problem.from_dict(base.to_dict()))
    assert key.replace(" ", "") == key and sorted(spec.problem_fields) == [
        name for name in sorted(base.to_dict()) if f'"{name}":' in key and name != "nsa"
    ]
    changes: dict[str, Any] = {"d_qk": 64, "d_v": 64, "dtype": "float16", "layout": "packed", "locality": 0.0}
    changes |= {"page_size": 16, "cache_dtype": "float8_e4m3fn"}
    for name, value in changes.items():
        assert (spec.problem_key(base.replace(**{name: value})) != key) == (name in spec.problem_fields), name


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_that_a_kernel_reads_are_in_its_key(family: str) -> None:
    """Two problems with equal keys may differ in length only, so they must give equal constants and lines."""
    spec = SPECS[family]
    base = served(spec, Problem())
    config = spec.default_config(base)
    fields = base.nsa.to_dict()
    for name, value in fields.items():
        other = base.replace(nsa=NSAConfig(**{**fields, name: value * 2 if name != "compress_block_size" else 16}))
        if spec.problem_key(other) == spec.problem_key(base):
            assert spec.constants(other, config) == spec.constants(base, config), name
            assert spec.structure(other, config) == spec.structure(base, config), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_costs_are_positive_and_grow_with_the_sequence(family: str, layout: str) -> None:
    spec = SPECS[family]
    costs = []
    for tokens in (1024, 4096, 16_384, 65_536):
        problem = served(spec, Problem(batch=2, seq_q=tokens, seq_k=tokens, layout=layout))
        costs.append(spec.cost(problem, spec.default_config(problem)))
    for cost in costs:
        assert min(cost.flops, cost.bytes_moved, cost.on_chip_bytes) > 0 and cost.mma_flops >= 0
    if family in NO_LONGER:
        assert len(set(costs)) == 1
        return
    for short, long in itertools.pairwise(costs):
        assert long.flops > short.flops and long.bytes_moved > short.bytes_moved
        assert long.on_chip_bytes > short.on_chip_bytes


# right, and inside its tensors


@pytest.mark.parametrize(("family", "config"), structures(SHORT_Q))
def test_every_structure_is_right_with_fewer_queries_than_keys(family: str, config: Config) -> None:
    check(SPECS[family], SHORT_Q, config)


@pytest.mark.parametrize(("family", "config"), structures(PACKED))
def test_every_structure_is_right_on_packed_sequences(family: str, config: Config) -> None:
    check(SPECS[family], PACKED, config)


@pytest.mark.parametrize("case", DEFAULT_CASES)
@pytest.mark.parametrize("family", TRAINING)
def test_the_default_is_right_on_every_kind_of_problem(family: str, case: str) -> None:
    spec, problem = SPECS[family], DEFAULT_CASES[case]
    if problem.nsa.num_compressed(problem.seq_k) == 0 and any(a.shape[:1] == ("C",) for a in spec.arguments):
        pytest.skip("no compressed block: the operator launches nothing")
    check(spec, problem, small_tiles(spec, problem, spec.default_config(problem)))


@pytest.mark.parametrize("family", ["cmp_pool_fwd", "cmp_mlp_fwd", "cmp_attn_fwd", "win_attn_fwd", "gate_sum_fwd"])
def test_the_default_is_right_on_the_specs_own_cases(family: str) -> None:
    for problem in SPECS[family].cases:
        check(SPECS[family], problem, SPECS[family].default_config(problem))


@pytest.mark.parametrize("num_splits", [2, 16, 64])
@pytest.mark.parametrize("dims", [{"seq_q": 77, "seq_k": 150}, {"seq_q": 131, "seq_k": 131}])
def test_runs_of_tokens_need_not_divide_the_tokens(num_splits: int, dims: dict[str, int]) -> None:
    """A run may be one tile, begin before the first token that sees a key, or lie behind the last token."""
    spec, problem = SPECS["cmp_attn_bwd_dkv"], SHORT_Q.replace(**dims)
    config = {**small_tiles(spec, problem, spec.default_config(problem)), "lockstep": True}
    check(spec, problem, {**config, "num_splits": num_splits})


@pytest.mark.parametrize("family", ["cmp_attn_bwd_dkv", "win_attn_bwd_dkv"])
def test_a_closed_gate_gives_no_gradient_and_no_nan(family: str) -> None:
    """The gate is part of the exponent, and log 0 is not finite."""
    spec, problem = SPECS[family], SHORT_Q
    module = load(render(spec, problem, small_tiles(spec, problem, spec.default_config(problem))))
    inputs = make_inputs(spec, problem, "cpu")
    gate, delta = inputs.tensors["gate"], inputs.tensors["delta"]
    assert gate is not None and delta is not None
    gate[:, ::2], delta[:, ::2] = 0.0, 0.0  # delta = gate rowsum(do o)
    inputs.call(module.launch)
    wanted = spec.reference(problem, inputs.tensors)
    for name in ("dk", "dv"):
        found = inputs.tensors[name]
        assert found is not None and wanted[name].abs().max() > 0.1
        torch.testing.assert_close(found.float(), wanted[name].float(), rtol=0.02, atol=0.01)
    gate[:], delta[:] = 0.0, 0.0
    inputs.call(module.launch)
    assert all(not inputs.tensors[name].any() for name in ("dk", "dv"))  # type: ignore[union-attr]


def test_wide_unions_are_right() -> None:
    """32 tokens a tile: the sign bit of a union's word stands for the last of them."""
    problem = SHORT_Q.replace(num_q_heads=1, seq_q=33, seq_k=120, locality=0.0)
    spec = SPECS["slc_attn_fwd"]
    config = {**spec.default_config(problem), "loop_order": "union", "BLOCK_T": 32, "BLOCK_N": 16}
    check(spec, problem, config)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_selection_in_many_turns_gives_equal_scores_to_the_lower_index(tokens: int) -> None:
    """Queries of zeros: all blocks inside have one score. 64 tokens of 4 heads are the widest tile."""
    problem = SHORT_Q.replace(seq_q=19, seq_k=1300, nsa=replace(SMALL, num_selected=5))
    spec = SPECS["slc_select_fwd"]
    config = {**spec.default_config(problem), "BLOCK_T": tokens, "BLOCK_N": 16, "BLOCK_J": 32, "swap": tokens == 64}
    module, inputs = load(render(spec, problem, config)), make_inputs(spec, problem, "cpu")
    q, lse = inputs.tensors["q"], inputs.tensors["lse"]
    assert q is not None and lse is not None
    visible = (torch.arange(1281, 1300) - SMALL.compress_block_size + 1) // SMALL.compress_stride + 1
    q.zero_()
    lse.copy_(visible.log()[None, :, None].expand_as(lse))
    inputs.call(module.launch)
    blocks = inputs.tensors["blocks"]
    own = torch.arange(1281, 1300) // SMALL.select_block_size
    expected = torch.stack([own * 0, own * 0 + 1, own * 0 + 2, own - 1, own], 1)
    assert blocks is not None and torch.equal(blocks[0, :, 0].long(), expected)


def test_queries_may_be_heads_of_a_wider_tensor() -> None:
    """q is read through its strides: a slice of a fused projection, or heads before tokens."""
    spec, problem = SPECS["win_attn_fwd"], SHORT_Q
    inputs = make_inputs(spec, problem, "cpu")
    module = load(render(spec, problem, small_tiles(spec, problem, spec.default_config(problem))))
    q, results = inputs.tensors["q"], []
    assert q is not None
    fused = torch.cat([torch.full_like(q, 9.0), q, torch.full_like(q, 9.0)], dim=2)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (q, fused[:, :, q.shape[2] : 2 * q.shape[2]], heads_first):
        inputs.tensors["q"] = given
        inputs.call(module.launch)
        results.append([torch.clone(inputs.tensors[name]) for name in ("o", "lse")])  # type: ignore[arg-type]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_watcher_notices_a_kernel_that_leaves_its_tensors() -> None:
    spec, problem = SPECS["gate_sum_fwd"], SHORT_Q
    module = load(render(spec, problem, spec.default_config(problem)))
    inputs = make_inputs(spec, problem, "cpu")
    inputs.tensors["gates"] = inputs.tensors["gates"][:, :-1]  # type: ignore[index]
    with watched(module) as (_, launch), pytest.raises(Exception) as caught:
        inputs.call(launch)
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(error, OutOfBounds) and "load" in str(error) for error in chain)


def test_scratch_memory_does_not_grow_with_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A persistent grid: as many score rows as programs, whatever the number of queries."""
    spec, problem = SPECS["slc_select_fwd"], SHORT_Q
    module = load(render(spec, problem, small_tiles(spec, problem, spec.default_config(problem))))
    asked: list[int] = []

    def empty(size: int, **how: Any) -> torch.Tensor:
        asked.append(size)
        return torch.empty(size, **how)

    names = {"empty_like": torch.empty_like, "float32": torch.float32, "cuda": torch.cuda}
    monkeypatch.setattr(module, "torch", SimpleNamespace(empty=empty, **names))
    monkeypatch.setattr(module.slc_select_fwd_kernel, "run", lambda *args, **kwargs: None)
    for tokens in (20, 60):
        make_inputs(spec, problem.replace(seq_q=tokens), "cpu").call(module.launch)
    assert asked[0] == asked[1]
