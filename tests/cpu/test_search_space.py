"""Presets, budgets, and the space of legal configs."""

from __future__ import annotations

import random
from dataclasses import replace

import optuna
import pytest
from cpu.search_fakes import DEFAULT, PARAMS, PROBLEM, SPACE, SPEC, FakeClock, make_spec

from nsa_autotune.errors import InvalidInput, InvalidProblem, UnknownName
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.search.budget import NAMED_BUDGETS, Budget, Meter, parse_budget
from nsa_autotune.search.presets import PRESETS, at_seq_len, get_preset, parse_seq_lens, tuning_problems
from nsa_autotune.search.space import ConfigSpace, config_key, is_ordered
from nsa_autotune.spec import Constraint, Param


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "d_qk", "d_v"),
    [
        ("paper-27b", 64, 4, 192, 128),
        ("gqa16-d128", 64, 4, 128, 128),
        ("llama-8b-like", 32, 8, 128, 128),
    ],
)
def test_presets_hold_the_shapes_they_are_named_after(
    name: str, heads: int, kv_heads: int, d_qk: int, d_v: int
) -> None:
    problem = get_preset(name).problem
    assert (problem.num_q_heads, problem.num_kv_heads, problem.d_qk, problem.d_v) == (heads, kv_heads, d_qk, d_v)
    assert get_preset(name).seq_lens == (8192, 32768, 65536)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", all_specs())
def test_every_family_serves_every_preset(name: str, family: str) -> None:
    preset = get_preset(name)
    for tokens in preset.seq_lens:
        for problem in tuning_problems(get_spec(family), at_seq_len(preset.problem, tokens)):
            get_spec(family).default_config(problem)


def test_unknown_preset_names_the_closest() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'paper-27b'\? Known: paper-27b, gqa16-d128"):
        get_preset("paper27b")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("8k,32k,64k", (8192, 32768, 65536)),
        ("1000", (1000,)),
        (" 1K , 2m ", (1024, 2 * 1024 * 1024)),
        ("8k,8192", (8192,)),
    ],
)
def test_seq_lens_are_read(text: str, tokens: tuple[int, ...]) -> None:
    assert parse_seq_lens(text) == tokens


@pytest.mark.parametrize("text", ["", "8k,", "0", "-8k", "8.5k", "8g", "k", "eight"])
def test_bad_seq_lens_are_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(InvalidProblem, match="Write for example 8k,32k,64k"):
        parse_seq_lens(text)


def test_seq_lens_are_bounded() -> None:
    assert parse_seq_lens("16m") == (16 * 1024 * 1024,)
    for text in ("17m", "16777217", "9" * 5000):
        with pytest.raises(InvalidProblem, match="at most 16m tokens"):
            parse_seq_lens(text)


def test_fewer_queries_than_keys() -> None:
    base = get_preset("tiny").problem
    assert [(p.seq_q, p.seq_k) for p in (at_seq_len(base, 64), at_seq_len(base, 64, 3))] == [(64, 64), (3, 64)]
    with pytest.raises(InvalidProblem, match="--seq-q at most"):
        at_seq_len(base, 64, 65)


def test_one_tensor_families_have_a_problem_for_keys_and_one_for_values() -> None:
    paper = get_preset("paper-27b").problem
    for family in ("cmp_pool_fwd", "cmp_mlp_fwd"):
        dims = [(p.d_qk, p.d_v) for p in tuning_problems(get_spec(family), paper)]
        assert dims == [(192, 192), (128, 128)]
    for family in ("cmp_attn_fwd", "slc_select_fwd", "slc_attn_fwd", "win_attn_fwd", "gate_sum_fwd"):
        assert tuning_problems(get_spec(family), paper) == (paper,)
    same = get_preset("gqa16-d128").problem
    assert tuning_problems(get_spec("cmp_pool_fwd"), same) == (same,)


@pytest.mark.parametrize(
    ("text", "trials", "minutes"),
    [("200", 200, None), ("30m", None, 30.0), ("90s", None, 1.5), ("2h", None, 120.0), ("200, 0.5m", 200, 0.5)],
)
def test_budgets_are_read(text: str, trials: int | None, minutes: float | None) -> None:
    assert parse_budget(text) == Budget(trials, minutes)


def test_named_budgets_grow() -> None:
    assert [parse_budget(name) for name in ("quick", " Normal", "FULL")] == list(NAMED_BUDGETS.values())
    sizes = [(b.max_trials or 0, b.max_minutes or 0.0) for b in NAMED_BUDGETS.values()]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("text", ["", "200,300", "30m,2h", "0", "-5", "5d", "1e3", "0m"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Write for example 200, 30m"):
        parse_budget(text)


def test_unknown_budget_names_the_closest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'normal'"):
        parse_budget("norml")


def test_a_budget_needs_one_side() -> None:
    with pytest.raises(InvalidInput, match="trials or minutes"):
        Budget()


def test_the_meter_takes_the_larger_share() -> None:
    meter = Meter(Budget(max_trials=10, max_minutes=1.0), trials=4, clock=FakeClock(step_s=12.0))
    assert meter.spent == pytest.approx(0.4)  # 12 s of 60 s, 4 trials of 10
    assert meter.spent == pytest.approx(0.4)  # 24 s
    assert meter.spent == pytest.approx(0.6)  # 36 s
    meter.trials = 10
    assert meter.exhausted


def test_enumeration_finds_exactly_the_legal_configs() -> None:
    configs = list(SPACE.configs())
    assert SPACE.num_points == 2 * 5 * 4 * 5 * 5 * 2
    # 1 token a tile: query only; 2 to 16: union only; the tile limit cuts 16 x 128 x 3.., 8 x 128 x 5, 16 x 64 x 5
    points = [(t, n, s) for t in (1, 2, 4, 8, 16) for n in (16, 32, 64, 128) for s in range(1, 6) if t * n * s <= 4096]
    assert len(configs) == len(points) * 5 * 2 == 950
    assert len({config_key(config) for config in configs}) == len(configs)
    assert all(SPEC.broken_constraint(PROBLEM, config) is None for config in configs)


def test_enumeration_is_lazy_and_capped() -> None:
    many = make_spec(params=(*PARAMS, *(Param(f"x{i}", tuple(range(8)), "") for i in range(6))))
    space = ConfigSpace(many, PROBLEM)
    assert space.num_points > 10**8
    assert space.is_legal(next(space.configs()))
    assert space.all_if_at_most(10**9) is None
    assert SPACE.all_if_at_most(100) is None
    legal = list(SPACE.configs())
    assert SPACE.all_if_at_most(len(legal)) == legal
    assert SPACE.all_if_at_most(len(legal) - 1) is None


def test_sampling_gives_every_config_once_and_then_none() -> None:
    small = ConfigSpace(
        make_spec(params=(*PARAMS[:1], *(Param(p.name, p.values[:2], "") for p in PARAMS[1:]))), PROBLEM
    )
    legal = {config_key(config) for config in small.configs()}
    rng, seen = random.Random(0), set()
    while (config := small.sample(rng, seen)) is not None:
        seen.add(config_key(config))
    assert seen == legal


def test_neighbours_are_one_legal_step_away() -> None:
    base = {**DEFAULT, "order": "union", "BLOCK_T": 4, "BLOCK_N": 16, "swap": True}
    found = {config_key(config) for config in SPACE.neighbours(base)}
    changes = [
        {"BLOCK_T": 2},
        {"BLOCK_T": 8},
        {"BLOCK_N": 32},  # 16 is the smallest
        {"num_warps": 2},
        {"num_warps": 8},
        {"num_stages": 1},
        {"num_stages": 3},
        {"swap": False},
        {"order": "query", "BLOCK_T": 1},  # a switch that needs a partner
    ]
    assert found == {config_key({**base, **change}) for change in changes}


def test_steps_jump_over_illegal_values() -> None:
    no_three = Constraint("no 3", lambda problem, config: config["num_stages"] != 3)
    gap = ConfigSpace(replace(SPEC, constraints=(*SPEC.constraints, no_three)), PROBLEM)
    stages = {config["num_stages"] for config in gap.neighbours({**DEFAULT, "num_stages": 2})}
    assert stages == {1, 2, 4}  # the step up ends at 4


def test_configs_survive_the_way_to_optuna_and_back() -> None:
    distributions = SPACE.distributions()
    assert "pad" not in distributions  # nothing to choose
    for config in list(SPACE.configs())[::37]:
        params = SPACE.to_params(config)
        trial = optuna.trial.create_trial(params=params, distributions=distributions, value=1.0)  # validates
        assert SPACE.from_params(trial.params) == config
    assert SPACE.to_params(DEFAULT)["BLOCK_N"] == 1  # the exponent's place, not the value 32


def test_switches_have_no_order() -> None:
    assert not is_ordered(Param("swap", (False, True), ""))
    assert not is_ordered(Param("order", ("a", "b"), ""))
    assert not is_ordered(Param("one", (4,), ""))
    assert is_ordered(Param("maxnreg", (0, 128, 168), ""))
    assert is_ordered(Param("share", (0.25, 0.5), ""))


def test_the_key_ignores_the_order_of_the_parameters() -> None:
    assert config_key(DEFAULT) == config_key(dict(reversed(DEFAULT.items())))
    assert config_key(DEFAULT) != config_key({**DEFAULT, "BLOCK_N": 64})


def needs(name: str) -> Constraint:
    return Constraint(f"both needs {name}", lambda p, config: not config["both"] or bool(config[name]))


SWITCHES, DIGITS = ("one", "two", "both"), tuple(f"part{number}" for number in range(9))
NEEDY = replace(  # a switch that needs two others, and digits that must be small together
    SPEC,
    params=(
        *(Param(name, (False, True), "a switch") for name in SWITCHES),
        *(Param(name, (0, 1, 2, 3), "a digit") for name in DIGITS),
    ),
    constraints=(
        needs("one"),
        needs("two"),
        Constraint("digits are small", lambda p, config: sum(int(config[name]) for name in DIGITS) <= 3),
    ),
    defaults=lambda problem: {**dict.fromkeys(SWITCHES, False), **dict.fromkeys(DIGITS, 0)},
)


def test_a_switch_is_repaired_with_all_that_it_needs() -> None:
    space = ConfigSpace(NEEDY, PROBLEM)
    config = space.repair({**NEEDY.default_config(PROBLEM), "both": True}, keep="both")
    assert config is not None and config["one"] and config["two"] and config["both"]
    never = replace(NEEDY, constraints=(Constraint("never", lambda p, config: False),))
    assert ConfigSpace(never, PROBLEM).repair(config) is None


def test_a_sample_of_a_sparse_space_is_found_by_walking() -> None:
    """About one point in two thousand is legal, too few for points at random; no config comes twice."""
    space, rng, seen = ConfigSpace(NEEDY, PROBLEM), random.Random(0), set[str]()
    assert space.num_points > 1_000_000
    for _ in range(100):
        config = space.sample(rng, seen)
        assert config is not None and space.is_legal(config) and config_key(config) not in seen
        seen.add(config_key(config))
    assert {part for key in seen for part in ("both", "one") if f'"{part}":true' in key} == {"both", "one"}
