"""Run by test_dispatch_plan in a process of its own, where Triton compiles: what is launched on a stub driver.

`python plan_child.py` runs every `check_` function and prints one JSON object: its name, and its error or "".
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nsa_autotune.codegen.compile import meta_arguments
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.dispatch import plan, triton_launch
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.dispatch.plan import MOST_PLANS, PreparedLaunch
from nsa_autotune.dispatch.triton_launch import CannotPrepareError
from nsa_autotune.errors import KernelError
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

PROBLEM = Problem(seq_q=64, seq_k=64, num_q_heads=4, num_kv_heads=1, d_qk=32, d_v=32, dtype="float16")
Launches = list[tuple[Any, ...]]


def trust() -> None:
    """Prepared launches are taken to be right: nothing runs on the stub."""


def same(error: Exception) -> Exception:
    """Errors as they are."""
    return error


def arguments_of(family: str) -> dict[str, Any]:
    """Fresh tensors and numbers of one launch."""
    given = meta_arguments(get_spec(family), PROBLEM)
    return {n: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for n, v in given.items()}


def module_of(family: str, **changes: Any) -> Any:
    """The loaded default variant, or one with changes."""
    spec = get_spec(family)
    return load(render(spec, PROBLEM, {**spec.default_config(PROBLEM), **changes}))


def prepare(family: str, **changes: Any) -> tuple[Any, PreparedLaunch, Counter[str]]:
    """A variant's module, its prepared launch, and what that counts."""
    module, ordinary = module_of(family, **changes), Counter[str]()
    return module, PreparedLaunch(module.launch, trust, ordinary, same), ordinary


def plain(launches: Launches, given: dict[str, Any]) -> list[Any]:
    """Launches with the caller's addresses by name and scratch by order; a hook chain without hooks counts as none."""
    names = {v.data_ptr(): n for n, v in given.items() if isinstance(v, Tensor)}
    scratch: dict[int, str] = {}

    def simple(x: Any) -> Any:
        if hasattr(x, "data_ptr"):
            x = x.data_ptr()
        if isinstance(x, (list, tuple)):
            return [simple(item) for item in x]
        if isinstance(x, int) and x > 1 << 32:  # an address
            return names.get(x) or scratch.setdefault(x, f"scratch {len(scratch)}")
        return None if type(x).__name__ in ("HookChain", "LazyDict") else x

    return [simple(list(launch)) for launch in launches]


def launched_alike(driver: Any, module: Any, served: PreparedLaunch, given: dict[str, Any]) -> Launches:
    """What is launched, which is what Triton's own launch with the same tensors is."""
    driver.take()
    served(given)
    prepared: Launches = driver.take()
    module.launch(**given)
    assert plain(prepared, given) == plain(driver.take(), given)
    return prepared


def same_as_tritons(driver: Any, family: str, num_kernels: int, **changes: Any) -> None:
    """What is launched for new tensors is what Triton's own launch of them is."""
    module, served, ordinary = prepare(family, **changes)
    first, second = arguments_of(family), arguments_of(family)
    served(first)
    recorded = driver.take()
    served(second)
    prepared = driver.take()
    module.launch(**second)
    wanted = driver.take()
    assert len(wanted) == num_kernels, len(wanted)
    assert plain(prepared, second) == plain(wanted, second)
    assert plain(recorded, first) == plain(wanted, second)
    assert "scratch" not in str(plain(prepared, second)) or family.startswith("slc"), "an address of the first call"
    assert not ordinary, ordinary


def check_one_kernel(driver: Any) -> None:
    same_as_tritons(driver, "gate_sum_fwd", 1)


def check_tensor_maps(driver: Any) -> None:
    same_as_tritons(driver, "win_attn_fwd", 1, use_tma=True)
    _, served, _ = prepare("win_attn_fwd", use_tma=True)
    given = arguments_of("win_attn_fwd")
    served(given)
    served(given)
    _, *maps = str(driver.take()[1]).split("'map', ")
    assert [int(text.split(",")[0]) for text in maps] == [given["k"].data_ptr(), given["v"].data_ptr()], maps


def check_scratch_and_two_kernels(driver: Any) -> None:
    same_as_tritons(driver, "slc_attn_fwd", 2, loop_order="union", BLOCK_T=4, use_tma=True)


def check_kernels_in_gluon_are_launched_alike(driver: Any) -> None:
    """Their descriptors carry the layout of the kernel's buffers."""
    held = {"gluon": True, "use_tma": True, "BLOCK_T": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    same_as_tritons(driver, "cmp_attn_fwd", 1, lean_softmax=True, q_in_registers=True, **held)
    same_as_tritons(driver, "slc_attn_fwd", 2, loop_order="union", lean_softmax=True, **held)
    same_as_tritons(driver, "cmp_attn_bwd_dq", 1, do_in_registers=True, **held)


def check_operators_between_kernels(driver: Any) -> None:
    same_as_tritons(driver, "slc_attn_bwd_dkv", 7)
    same_as_tritons(driver, "slc_attn_fwd", 5, loop_order="key_major")


def check_operators_see_the_callers_tensors(driver: Any) -> None:
    """The sums at the end of a launch land in the outputs of this call, not in those of the recorded one."""
    _, served, ordinary = prepare("cmp_mlp_bwd")
    first, second = arguments_of("cmp_mlp_bwd"), arguments_of("cmp_mlp_bwd")
    served(first)
    outputs = ("dw1", "db1", "dw2", "db2")
    for name in outputs:
        first[name].fill_(5.0)
        second[name].fill_(7.0)
    served(second)  # no kernel runs: the parts hold whatever memory held, so only the written tensors tell
    assert all(bool((first[name] == 5.0).all()) for name in outputs)
    assert not all(bool((second[name] == 7.0).all()) for name in outputs)
    assert not ordinary


def check_equal_arguments_are_told_apart(driver: Any) -> None:
    """k and v may be one tensor in the first call and two in the next."""
    _, served, _ = prepare("win_attn_fwd", use_tma=False)
    first = arguments_of("win_attn_fwd")
    served({**first, "v": first["k"]})
    driver.take()
    served(first)
    text = str(plain(driver.take(), first))
    assert "'k'" in text and "'v'" in text, text


def check_another_number_is_prepared_anew(driver: Any) -> None:
    module, served, _ = prepare("win_attn_fwd")
    given = arguments_of("win_attn_fwd")
    served(given)
    for scale in (0.5, 0.25, 0.5):
        launched_alike(driver, module, served, {**given, "scale": scale})
    assert len(served._plans) == 3


def check_other_strides_are_prepared_anew(driver: Any) -> None:
    module, served, ordinary = prepare("win_attn_fwd", use_tma=False)
    given = arguments_of("win_attn_fwd")
    served(given)
    for heads in (8, 8, 12, 8, 12):
        wide = torch.zeros(1, 64, heads, 32, dtype=torch.float16)
        viewed = {**given, "q": wide[:, :, :4], "k": wide[:, :, 6:7]}  # other strides and storage offsets
        launched_alike(driver, module, served, viewed)
    assert len(served._plans) == 3 and not ordinary


def check_a_misaligned_tensor_has_a_plan_of_its_own(driver: Any) -> None:
    """Triton compiles another kernel for it: other loads."""
    kernels = plans_of_alternatives(driver, "gate_sum_fwd", "o_cmp", lambda x, n: x.new_zeros(x.numel() + 8)[n : n - 8])
    assert kernels[0] == kernels[4] != kernels[1] == kernels[2] == kernels[3], kernels


def check_a_column_of_gates_is_prepared(driver: Any) -> None:
    """As in training, where those of two branches are misaligned."""
    plans_of_alternatives(driver, "win_attn_bwd_dq", "gate", lambda x, n: x.new_zeros((*x.shape, 3))[..., n])


def plans_of_alternatives(driver: Any, family: str, name: str, make: Callable[[Tensor, int], Tensor]) -> list[int]:
    """The kernels launched with an argument that begins 0, 1, 2, 1 and 0 elements in."""
    module, served, ordinary = prepare(family)
    given, kernels = arguments_of(family), []
    for begin in (0, 1, 2, 1, 0):
        other = {**given, name: make(given[name], begin).view(given[name].shape)}
        kernels.append(launched_alike(driver, module, served, other)[0][4])
    assert len(served._plans) == 2 and not ordinary, ordinary
    return kernels


def check_a_plan_that_cannot_be_made_is_counted(driver: Any) -> None:
    """The recorded launch is done by then."""
    _, served, ordinary = prepare("gate_sum_fwd")
    given = arguments_of("gate_sum_fwd")
    make, plan.make_plan = plan.make_plan, lambda *_: exec("try:")
    try:
        served(given)
    finally:
        plan.make_plan = make
    assert len(driver.take()) == 1 and sum(ordinary.values()) == 1 and "IndentationError" in str(ordinary), ordinary
    served(given)
    assert len(driver.take()) == 1 and sum(ordinary.values()) == 2


def check_strides_that_no_kernel_takes_are_not_compared(driver: Any) -> None:
    """A kernel takes the strides of q, and the operators' word that lse is contiguous."""
    module, served, _ = prepare("win_attn_fwd", use_tma=False)
    given = arguments_of("win_attn_fwd")
    served(given)
    for name, plans in (("lse", 1), ("q", 2)):
        *sizes, last = given[name].shape
        viewed = {**given, name: torch.zeros(*sizes, 2 * last, dtype=given[name].dtype)[..., :last]}
        launched_alike(driver, module, served, viewed)
        assert len(served._plans) == plans, name


def check_none_in_place_of_a_tensor_is_no_match(driver: Any) -> None:
    _, served, _ = prepare("gate_sum_fwd")
    given = arguments_of("gate_sum_fwd")
    served(given)
    assert served._plans[0]({**given, "gates": None}) is False
    assert served._plans[0]({name: value for name, value in given.items() if name != "out"} | {"x": 1}) is False


def check_layouts_are_bounded(driver: Any) -> None:
    _, served, ordinary = prepare("win_attn_fwd")
    given = arguments_of("win_attn_fwd")
    for number in range(MOST_PLANS + 2):
        served({**given, "scale": 1.0 + number})
    assert len(driver.take()) == MOST_PLANS + 2
    assert len(served._plans) == MOST_PLANS and sum(ordinary.values()) == 2


def check_the_stream_is_asked_for_in_every_call(driver: Any) -> None:
    _, served, _ = prepare("gate_sum_fwd")
    given = arguments_of("gate_sum_fwd")
    for driver.stream in (0, 7, 9):
        served(given)
    assert [launch[3] for launch in driver.take()] == [0, 7, 9]
    driver.stream = 0


def check_every_device_has_its_own(driver: Any) -> None:
    ordinary: dict[int, Dispatcher] = {}
    dispatcher = Dispatcher(None, fingerprint=for_target("cuda:90"), trusted=trust)
    spec, given = get_spec("gate_sum_fwd"), arguments_of("gate_sum_fwd")
    for driver.device in (0, 1, 0, 1):
        dispatcher.launch(spec, ("gate_sum_fwd", driver.device), lambda: PROBLEM, f"cuda:{driver.device}", given)
    assert [launch[3] for launch in driver.take()] == [0, 1000, 0, 1000]
    driver.device = 0
    assert not dispatcher.ordinary and not ordinary


def check_hooks_get_tritons_own_launch(driver: Any) -> None:
    from triton import knobs

    _, served, ordinary = prepare("gate_sum_fwd")
    given, seen = arguments_of("gate_sum_fwd"), []
    served(given)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        driver.take()
        served(given)
        assert type(driver.take()[0][9]).__name__ == "HookChain" or triton_launch.triton_version() < (3, 7)
        assert ordinary == {"launch hooks are installed": 1}
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    served(given)
    assert ordinary == {"launch hooks are installed": 1} and len(driver.take()) == 1


def check_a_failing_first_launch_prepares_nothing(driver: Any) -> None:
    dispatcher = Dispatcher(None, fingerprint=for_target("cuda:90"), trusted=trust)
    spec, given = get_spec("gate_sum_fwd"), arguments_of("gate_sum_fwd")
    driver.fails = "no such luck"
    for _ in range(2):
        try:
            dispatcher.launch(spec, "shape", lambda: PROBLEM, "cuda:0", given)
        except KernelError as error:
            assert "gate_sum_fwd failed: RuntimeError: no such luck" in str(error), error
        else:
            raise AssertionError("no error")
        assert not dispatcher.stats and not dispatcher._plans
    driver.fails = ""
    dispatcher.launch(spec, "shape", lambda: PROBLEM, "cuda:0", given)
    driver.fails = "later"
    try:
        dispatcher.launch(spec, "shape", lambda: PROBLEM, "cuda:0", given)
    except KernelError as error:
        assert "later" in str(error), error
    else:
        raise AssertionError("no error from a prepared launch")
    finally:
        driver.fails = ""
        driver.take()


def at_once(work: Callable[[Any], None], items: list[Any]) -> None:
    """A thread for each item; raises what one of them raised."""
    with ThreadPoolExecutor(len(items)) as threads:
        list(threads.map(work, items))


def check_threads_do_not_mix_their_tensors(driver: Any) -> None:
    _, served, ordinary = prepare("slc_attn_fwd", loop_order="union", BLOCK_T=4)
    batches = [arguments_of("slc_attn_fwd") for _ in range(4)]

    def work(given: dict[str, Any]) -> None:
        for _ in range(50):
            served(given)

    at_once(work, batches)
    assert len(served._plans) == 1 and not ordinary, ordinary
    places = {given[name].data_ptr(): n for n, given in enumerate(batches) for name in ("q", "k", "v", "o", "lse")}
    launches = driver.take()
    assert len(launches) == 400, len(launches)
    for launch in launches:
        owners = {places[x] for x in _numbers(launch) if x in places}
        assert len(owners) <= 1, owners


def check_threads_wait_until_a_kernel_is_loaded(driver: Any) -> None:
    """Triton by itself lets a second thread load it again, over the first one's handles."""
    _, served, ordinary = prepare("gate_sum_fwd", num_warps=8)

    def work(number: int) -> None:
        assert number == 0 or driver.loading.wait(60)
        served(arguments_of("gate_sum_fwd"))

    driver.loading.clear()
    driver.loads, driver.loads_in = 0, 0.2  # seconds
    try:
        at_once(work, [0, 1, 2])
    finally:
        driver.loads_in = 0.0
    assert driver.loads == 1, driver.loads
    assert len(driver.take()) == 3 and len(served._plans) == 1 and not ordinary, ordinary


def check_threads_load_a_shape_once(driver: Any) -> None:
    dispatcher = Dispatcher(None, fingerprint=for_target("cuda:90"), trusted=trust)
    spec, batches = get_spec("gate_sum_fwd"), [arguments_of("gate_sum_fwd") for _ in range(4)]
    at_once(lambda given: dispatcher.launch(spec, "shape", lambda: PROBLEM, "cuda:0", given), batches)
    assert sum(dispatcher.stats.values()) == 1, dispatcher.stats
    (miss,) = dispatcher.misses.most_asked()
    assert miss.count == 4 and len(driver.take()) == 4


def _numbers(value: Any) -> list[int]:
    """All ints in nested tuples, tensors as their addresses."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    if hasattr(value, "data_ptr"):
        return [value.data_ptr()]
    return [value] if isinstance(value, int) else []


def check_distrust_goes_tritons_way(driver: Any) -> None:
    def refuse() -> None:
        raise CannotPrepareError("not here")

    module, ordinary = module_of("gate_sum_fwd"), Counter[str]()
    served = PreparedLaunch(module.launch, refuse, ordinary, same)
    for _ in range(3):
        served(arguments_of("gate_sum_fwd"))
    assert ordinary == {"not here": 3} and not served._plans and len(driver.take()) == 3


def check_an_unknown_triton_is_refused(driver: Any) -> None:
    import triton

    found, triton.__version__ = triton.__version__, "3.10.1"
    try:
        triton_launch.check_version()
    except CannotPrepareError as error:
        assert "Triton 3.10 is not known here" in str(error)
    else:
        raise AssertionError("taken for known")
    finally:
        triton.__version__ = found
    triton_launch.check_version()


def check_what_is_not_understood_is_launched_once_and_counted(driver: Any) -> None:
    module = module_of("gate_sum_fwd")
    outside = torch.zeros(64 * 4 * 3, dtype=torch.float16)
    namespace = {"kernel": module.gate_sum_fwd_kernel, "outside": outside, "constants": {**module.CONSTANTS}}
    call = "kernel.run(o, o, o, outside, out, o.numel(), grid=(1,), warmup=False, **constants)"
    source = f"def launch(o, out):\n    {call}"
    exec(source, namespace)
    ordinary = Counter[str]()
    served = PreparedLaunch(namespace["launch"], trust, ordinary, same)
    given = {"o": torch.zeros(64, 4, 32, dtype=torch.float16), "out": torch.zeros(64, 4, 32, dtype=torch.float16)}
    for _ in range(2):
        served(given)
    assert len(driver.take()) == 2
    assert ordinary == {"a tensor comes from outside of the launch": 2}, ordinary


def check_a_plan_keeps_no_tensor_alive(driver: Any) -> None:
    import gc
    import weakref

    _, served, _ = prepare("slc_attn_fwd", loop_order="union", BLOCK_T=4, use_tma=True)
    given = arguments_of("slc_attn_fwd")
    watched = [weakref.ref(value) for value in given.values() if isinstance(value, Tensor)]
    storages = [value.untyped_storage()._weak_ref() for value in given.values() if isinstance(value, Tensor)]
    served(given)
    driver.take()
    del given
    gc.collect()
    assert not any(ref() is not None for ref in watched)
    assert all(torch.UntypedStorage._expired(one) for one in storages)


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}


def main() -> None:
    """Run them all."""
    from cpu.stub_driver import stub_driver

    found = {}
    with stub_driver() as driver:
        for name, check in CHECKS.items():
            try:
                check(driver)
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
                driver.fails, driver.device, driver.stream = "", 0, 0
            driver.take()
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    import os

    os._exit(0)  # binaries that the stub loaded are not unloaded


if __name__ == "__main__":
    main()
