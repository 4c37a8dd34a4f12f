"""Templates to source, files, modules and binaries: what is written is plain, linted, traceable and safe to share."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from problems import served

from nsa_autotune.codegen import paths
from nsa_autotune.codegen import render as render_module
from nsa_autotune.codegen.compile import compile_variant, parse_target, shared_limit_bytes
from nsa_autotune.codegen.golden import all_structures, structural_configs
from nsa_autotune.codegen.grid import Launches, watch_launches
from nsa_autotune.codegen.linemap import explain_line
from nsa_autotune.codegen.load import explain, line_map_of, load, write_source
from nsa_autotune.codegen.pool import CompileJob, compile_many
from nsa_autotune.codegen.render import Rendered, compile_options, render, template_digest
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import InvalidConfig, InvalidProblem, KernelError, RenderError, UnknownName
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.spec import Config, KernelSpec, Problem

REPO = Path(__file__).resolve().parents[2]
FAMILIES = tuple(all_specs())
PROBLEM = Problem(seq_q=256, seq_k=256, num_q_heads=4, num_kv_heads=1, d_qk=64, d_v=64)
ODD = NSAConfig(compress_block_size=16, compress_stride=16, select_block_size=32, num_selected=5, window_size=100)
PROBLEMS = {
    "batched": PROBLEM,
    "packed": PROBLEM.replace(layout="packed", batch=3),
    "d192_128": PROBLEM.replace(d_qk=192, d_v=128),
    "d192_128_packed": PROBLEM.replace(d_qk=192, d_v=128, layout="packed", batch=3),
    "float32": PROBLEM.replace(dtype="float32"),
    "odd": PROBLEM.replace(nsa=ODD, num_q_heads=5, d_qk=112, d_v=48),
    "paged": PROBLEM.replace(layout="paged", seq_q=2),
    "odd_paged": PROBLEM.replace(layout="paged", seq_q=3, nsa=ODD, num_q_heads=5, d_qk=112, d_v=48, page_size=16),
    "fp8_paged": PROBLEM.replace(layout="paged", seq_q=1, cache_dtype="float8_e4m3fn"),
    "odd_packed": PROBLEM.replace(nsa=ODD, num_q_heads=5, d_qk=112, d_v=48, layout="packed", batch=3),
}


def variants() -> Iterator[tuple[str, KernelSpec, Problem, Config]]:
    """Every legal combination of the structural switches for the plain problems, each two of them for the others."""
    for family, spec in all_specs().items():
        for label, problem in PROBLEMS.items():
            if problem.layout not in spec.layouts:
                continue
            choose = all_structures if label in ("batched", "paged") else structural_configs
            for number, config in enumerate(choose(spec, problem)):
                yield f"{family}__{label}__{number}", spec, problem, config


def rendered(family: str, problem: Problem = PROBLEM, **changes: Any) -> Rendered:
    """The default variant, or one with other parameters."""
    spec = get_spec(family)
    problem = served(spec, problem)
    return render(spec, problem, {**spec.default_config(problem), **changes})


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the templates that a test may spoil."""
    copy = tmp_path / "templates"
    shutil.copytree(paths.template_dir(), copy)
    monkeypatch.setattr(render_module, "template_dir", lambda: copy)
    return copy


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; it does not exist yet."""
    monkeypatch.setenv("NSA_AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spoil(file: Path, text: str, mistake: str) -> int:
    """Put a mistake into a template; the line of it."""
    source = file.read_text(encoding="utf-8")
    assert source.count(text) == 1
    file.write_text(source.replace(text, mistake), encoding="utf-8")
    return source[: source.index(text)].count("\n") + 1


# rendering


@pytest.mark.parametrize("family", FAMILIES)
def test_rendering_twice_gives_the_same_bytes(family: str) -> None:
    first = rendered(family)
    render_module._environment.cache_clear()
    assert rendered(family) == first


@pytest.mark.parametrize("family", FAMILIES)
def test_the_header_tells_where_a_file_comes_from(family: str) -> None:
    spec, result = get_spec(family), rendered(family)
    doc = ast.get_docstring(ast.parse(result.source))
    assert doc is not None
    assert f"from templates/{spec.template}; do not edit" in doc
    lines = dict(line.split(": ", 1) for line in doc.splitlines() if ": " in line)
    assert lines["template digest"] == result.template_digest == template_digest(spec)
    assert lines["variant digest"].strip() == result.digest
    problem = served(spec, PROBLEM)
    config = spec.default_config(problem)
    assert json.loads(lines["config"]) == config
    constants = spec.constants(problem, config)
    assert constants.items() <= json.loads(lines["problem"]).items()
    assert json.loads(lines["problem"])["dtype"] == "bfloat16"


def test_every_structure_is_valid_python_that_imports_only_torch_and_triton() -> None:
    for name, spec, problem, config in variants():
        tree = ast.parse(render(spec, problem, config).source, name)
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in modules} <= {"torch", "triton"}, name
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "launch" in functions, name
        assert any(re.fullmatch(f"{spec.family}(_[a-z]+)?_kernel", function) for function in functions), name


def test_every_structure_passes_the_linter_and_the_formatter(tmp_path: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    for name, spec, problem, config in variants():
        (tmp_path / f"{name}.py").write_text(render(spec, problem, config).source, encoding="utf-8")
    assert len(list(tmp_path.iterdir())) > 100
    for arguments in (["check", "--select", "E9,F"], ["format", "--check", "--diff", "--line-length", "120"]):
        command = [*ruff, arguments[0], "--isolated", "--no-cache", *arguments[1:], str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_different_switches_render_different_lines_and_equal_ones_equal_digests() -> None:
    plain, tma = rendered("win_attn_fwd", use_tma=False), rendered("win_attn_fwd", use_tma=True)
    assert "TensorDescriptor" in tma.source and "TensorDescriptor" not in plain.source
    other_length = rendered("win_attn_fwd", PROBLEM.replace(seq_q=512, seq_k=512, batch=7), use_tma=False)
    assert other_length == plain  # lengths are arguments, not constants
    packed = rendered("win_attn_fwd", PROBLEMS["packed"])
    assert "q_pos_ptr" in packed.source and "q_pos_ptr" not in plain.source
    names = {render(spec, problem, config).digest for _, spec, problem, config in variants()}
    assert len(names) == len({render(spec, problem, config).source for _, spec, problem, config in variants()})


def test_only_options_with_a_value_reach_the_compiler() -> None:
    assert compile_options({"num_warps": 4, "num_stages": 3, "maxnreg": 0, "BLOCK_N": 64}) == {
        "num_warps": 4,
        "num_stages": 3,
    }
    assert '"maxnreg": 128' in rendered("win_attn_fwd", maxnreg=128).source


@pytest.mark.parametrize("family", FAMILIES)
def test_every_line_with_text_knows_its_template_line(family: str) -> None:
    result = rendered(family)
    lines = result.source.split("\n")
    assert len(result.line_map) == len(lines)
    for line, origin in zip(lines, result.line_map, strict=True):
        assert (origin is not None) == bool(line.strip())
        if origin is not None:
            source = (paths.template_dir() / origin[0]).read_text(encoding="utf-8").split("\n")
            assert 1 <= origin[1] <= len(source)
            literal = source[origin[1] - 1]
            if "{" not in literal:
                assert literal.strip() == line.strip(), origin
    assert "\ue000" not in result.source


def test_a_line_without_an_origin_is_explained_by_the_one_above() -> None:
    line_map = [("a.py.j2", 3), None, None]
    assert explain_line(line_map, 3) == "generated line 3 = templates/a.py.j2:3"
    assert explain_line([None], 1) == "generated line 1"
    assert explain_line(line_map, 9) == "generated line 9 = templates/a.py.j2:3"


# mistakes in templates and in what is asked of them


def test_an_undefined_name_in_a_template_is_refused_with_its_line(templates: Path) -> None:
    line = spoil(templates / "gate_sum_fwd.py.j2", "gate = offs // D * 3", "gate = offs // {{ nothing }} * 3")
    with pytest.raises(RenderError, match="gate_sum_fwd does not render: 'nothing' is undefined") as caught:
        rendered("gate_sum_fwd")
    assert caught.value.values == {"template": "gate_sum_fwd.py.j2", "line": line}


def test_an_undefined_name_in_a_macro_is_refused_with_the_macros_line(templates: Path) -> None:
    line = spoil(templates / "common" / "attention.j2", "m_i = m_new\n", "m_i = {{ nothing }}\n")
    with pytest.raises(RenderError, match="'nothing' is undefined") as caught:
        rendered("win_attn_fwd")
    assert caught.value.values == {"template": "attention.j2", "line": line}


def test_a_template_that_jinja_cannot_parse_is_refused_with_its_line(templates: Path) -> None:
    line = spoil(templates / "gate_sum_fwd.py.j2", "    gate = offs // D * 3", "    gate = {{ offs // }}")
    with pytest.raises(RenderError, match="gate_sum_fwd does not render") as caught:
        rendered("gate_sum_fwd")
    assert caught.value.values == {"template": "gate_sum_fwd.py.j2", "line": line}


def test_source_that_is_no_python_is_refused_with_the_template_line(templates: Path) -> None:
    line = spoil(templates / "gate_sum_fwd.py.j2", "    gate = offs // D * 3", "    gate = = offs")
    with pytest.raises(RenderError, match="renders to invalid Python") as caught:
        rendered("gate_sum_fwd")
    assert caught.value.values == {"template line": ("gate_sum_fwd.py.j2", line)}


def test_a_missing_template_is_named(templates: Path) -> None:
    (templates / "gate_sum_fwd.py.j2").unlink()
    with pytest.raises(RenderError, match=r"a family needs its template.*gate_sum_fwd\.py\.j2"):
        rendered("gate_sum_fwd")


@pytest.mark.parametrize("file", ["win_attn_fwd.py.j2", "common/attention.j2", "common/header.j2"])
def test_the_digest_changes_with_the_template_and_with_any_macro_it_imports(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rendered("win_attn_fwd")
    shutil.copytree(paths.template_dir(), tmp_path / "copy")
    monkeypatch.setattr(render_module, "template_dir", lambda: tmp_path / "copy")
    assert rendered("win_attn_fwd") == before  # the folder does not matter
    shutil.copytree(paths.template_dir(), tmp_path / "other")
    changed = tmp_path / "other" / file
    changed.write_text(changed.read_text(encoding="utf-8") + "{# a remark #}\n", encoding="utf-8")
    monkeypatch.setattr(render_module, "template_dir", lambda: tmp_path / "other")
    after = rendered("win_attn_fwd")
    assert after.template_digest != before.template_digest
    assert after.digest != before.digest


@pytest.mark.parametrize("file", ["gate_sum_fwd.py.j2", "common/compress.j2"])
def test_another_familys_template_does_not_change_the_digest(file: str, templates: Path) -> None:
    before = template_digest(replace(get_spec("win_attn_fwd")))
    changed = templates / file
    changed.write_text(changed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    render_module._digest_of.cache_clear()
    assert template_digest(get_spec("win_attn_fwd")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"BLOCK_N": 48}, "BLOCK_N=48 is not one of (16, 32, 64, 128, 256)"),
        ({"BLOCK_T": 64}, "a tile must have 16 to 128 rows"),
        ({"typo": 1}, "unknown parameters ['typo']"),
        ({"num_warps": 8, "maxnreg": 8}, "maxnreg=8 is not one of"),
    ],
    ids=["value", "constraint", "unknown", "register_cap"],
)
def test_an_illegal_config_is_refused_with_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        rendered("win_attn_fwd", **changes)
    assert words in str(caught.value) and str(caught.value).startswith("win_attn_fwd: ")


def test_a_missing_parameter_is_named() -> None:
    spec = get_spec("win_attn_fwd")
    config = {name: value for name, value in spec.default_config(PROBLEM).items() if name != "BLOCK_N"}
    with pytest.raises(InvalidConfig, match="BLOCK_N is missing"):
        render(spec, PROBLEM, config)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (PROBLEM.replace(d_qk=80 + 8), "head dims must be multiples of 16"),
        (PROBLEM.replace(d_v=272), "head dims must be multiples of 16, at most 256"),
        (PROBLEM.replace(d_qk=240), "a sum of at most three powers of two"),
        (PROBLEM.replace(num_q_heads=65), "the group size must be at most 64"),
    ],
    ids=["not_16", "too_wide", "four_chunks", "group"],
)
def test_a_problem_that_no_kernel_serves_is_refused_with_a_sentence(problem: Problem, words: str) -> None:
    config = get_spec("win_attn_fwd").default_config(PROBLEM)
    with pytest.raises(InvalidProblem) as caught:
        render(get_spec("win_attn_fwd"), problem, config)
    assert words in str(caught.value)


# files and modules


def test_a_loaded_module_has_a_launch_and_its_values(cache: Path) -> None:
    spec = get_spec("gate_sum_fwd")
    config = spec.default_config(PROBLEM)
    result = render(spec, PROBLEM, config)
    module = load(result)
    assert callable(module.launch)
    assert config == module.CONFIG
    assert spec.constants(PROBLEM, config) == module.CONSTANTS
    assert compile_options(config) == module.OPTIONS
    assert module.__file__ == str(cache / "generated" / f"gate_sum_fwd__{result.digest}.py")
    assert line_map_of(Path(str(module.__file__))) == result.line_map


def test_a_file_is_written_once_and_mended_if_it_differs(cache: Path) -> None:
    result = rendered("gate_sum_fwd")
    path = write_source(result)
    stamp = path.stat().st_mtime_ns
    assert write_source(result) == path and path.stat().st_mtime_ns == stamp
    path.write_text("half a fi", encoding="utf-8")  # another program's accident
    write_source(result)
    assert path.read_text(encoding="utf-8") == result.source
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(
        [path.name, path.with_suffix(".map.json").name]
    )  # no temporary file is left


def test_a_failed_write_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KernelError, match="NSA_AUTOTUNE_CACHE_DIR"):
        write_source(rendered("gate_sum_fwd"))
    assert list((cache / "generated").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("NSA_AUTOTUNE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="Set NSA_AUTOTUNE_CACHE_DIR to a folder you may write") as caught:
        load(rendered("gate_sum_fwd"))
    assert caught.value.values["folder"] == str(tmp_path / "file" / "generated")
    assert "Not a directory" in str(caught.value.values["message"])


def test_many_threads_and_processes_may_load_one_variant_at_once(cache: Path) -> None:
    code = (
        "from nsa_autotune.codegen.load import load; from nsa_autotune.codegen.render import render\n"
        "from nsa_autotune.kernels import get_spec; from nsa_autotune.spec import Problem\n"
        "spec, problem = get_spec('win_attn_fwd'), Problem()\n"
        "for number in range(20):\n"
        "    config = {**spec.default_config(problem), 'maxnreg': (0, 128, 168, 224)[number % 4]}\n"
        "    print(load(render(spec, problem, config)).CONFIG['maxnreg'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    others = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        modules = list(threads.map(lambda _: load(rendered("gate_sum_fwd")), range(16)))
    assert len({module.__file__ for module in modules}) == 1
    for other in others:
        assert other.communicate(timeout=60)[0].split() == ["0", "128", "168", "224"] * 5
        assert other.returncode == 0


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_AUTOTUNE_CACHE_DIR", "/somewhere/else")
    assert paths.generated_dir() == Path("/somewhere/else/generated")
    monkeypatch.delenv("NSA_AUTOTUNE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert paths.cache_dir() == Path("/xdg/nsa_autotune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.cache_dir() == Path.home() / ".cache" / "nsa_autotune"


def test_an_error_inside_launch_is_explained_by_its_template_line(cache: Path, templates: Path) -> None:
    line = spoil(templates / "gate_sum_fwd.py.j2", "num_elements = out.numel()", "num_elements = out.nummel()")
    result = rendered("gate_sum_fwd")
    with pytest.raises(AttributeError) as caught:
        load(result).launch(None, None, None, None, None)
    assert explain(caught.value, result).endswith(f"= templates/gate_sum_fwd.py.j2:{line}")


# targets and compilation


def test_targets_are_known_by_name() -> None:
    assert parse_target("cuda:90").arch == 90 and parse_target("cuda:90").name == "cuda:90"
    assert shared_limit_bytes("cuda:90") == 232_448 and shared_limit_bytes("cuda:80") == 166_912
    amd = parse_target("hip:gfx942")
    assert (amd.backend, amd.arch, amd.warp_size, amd.shared_limit_bytes) == ("hip", "gfx942", 64, 65_536)
    assert parse_target("cuda:90").warp_size == 32
    with pytest.raises(UnknownName, match=r"cuda:75.*Known targets: cuda:80"):
        parse_target("cuda:75")


def test_compilation_is_refused_where_triton_interprets() -> None:
    job = CompileJob("gate_sum_fwd", PROBLEM.to_dict(), get_spec("gate_sum_fwd").default_config(PROBLEM))
    with pytest.raises(KernelError, match="Unset TRITON_INTERPRET"):
        list(compile_many({"gate_sum_fwd": get_spec("gate_sum_fwd")}, [job]))
    with pytest.raises(KernelError, match="Unset TRITON_INTERPRET"):
        compile_variant(get_spec("gate_sum_fwd"), PROBLEM, job.config)


def child(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process in which Triton compiles."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "NSA_AUTOTUNE_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "CODEGEN_CHILD": uuid.uuid4().hex,
    }
    environment.pop("TRITON_INTERPRET")
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("codegen_child.py")), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a child process saw when it compiled; `lines` holds where the mistakes are."""
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(paths.template_dir(), folder / "templates")
    lines = {
        "kernel": spoil(folder / "templates" / "gate_sum_fwd.py.j2", "offs < num_elements", "offs < num_elemints"),
        "macro": spoil(
            folder / "templates" / "common" / "attention.j2", "alpha = tl.exp2(m_i - m_new)", "alpha = tl.exp22(m_i)"
        ),
        "launch": spoil(folder / "templates" / "cmp_pool_fwd.py.j2", "grid=(triton.cdiv(", "grid=(triton.cdivv("),
    }
    process = child(folder, "compile", str(folder / "templates"))
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-3000:]
    return {**json.loads(out.splitlines()[-1]), "lines": lines}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "union"])
def test_compiling_for_an_absent_gpu_tells_the_resources(compiled: dict[str, Any], target: str) -> None:
    resources = compiled[target]
    assert 8 <= resources["registers"] <= 255
    assert resources["spill_bytes"] == 0
    assert resources["num_warps"] == (2 if target == "union" else 4)
    assert resources["compile_ms"] > 0
    if target == "union":  # two kernels: the largest demand of both
        assert 16_384 <= resources["shared_bytes"] <= 232_448
    assert compiled["cuda:80"]["binary_sha"] != compiled["cuda:90"]["binary_sha"]


def test_a_selection_of_one_block_for_one_token_compiles(compiled: dict[str, Any]) -> None:
    """Its running best is one number a program: a tensor, not a scalar."""
    assert compiled["one_block"]["registers"] > 0


def test_programs_are_counted_as_the_launch_starts_them(compiled: dict[str, Any]) -> None:
    block = get_spec("gate_sum_fwd").default_config(PROBLEM)["BLOCK"]
    outputs = PROBLEM.batch * PROBLEM.seq_q * PROBLEM.num_q_heads * PROBLEM.d_v
    assert compiled["cuda:90"]["num_programs"] == -(-outputs // int(block)) > 1
    tile = int(get_spec("win_attn_fwd").default_config(PROBLEM)["BLOCK_T"])
    assert compiled["window"]["num_programs"] == -(-PROBLEM.seq_q // tile) * PROBLEM.num_kv_heads * PROBLEM.batch


def test_amd_is_compiled_for_as_well(compiled: dict[str, Any]) -> None:
    amd, nvidia = compiled["amd"], compiled["window"]
    assert 16 <= amd["registers"] <= 512 and amd["spill_bytes"] >= 0
    assert 0 < amd["shared_bytes"] <= 65_536
    assert amd["num_programs"] == nvidia["num_programs"]
    assert amd["call_sha"] == nvidia["call_sha"] != ""
    assert amd["binary_sha"] != nvidia["binary_sha"]
    status, reason = compiled["capped_amd"]
    assert status == "constraint" and "caps registers for NVIDIA only" in reason and "maxnreg=128" in reason


def test_dependent_launch_is_for_gpus_that_have_it(compiled: dict[str, Any]) -> None:
    status, reason = compiled["early_cuda:89"]
    assert status == "constraint" and "needs an NVIDIA GPU from sm_90 on" in reason and "launch_pdl=False" in reason
    assert compiled["early_cuda:90"][0] == "ok"


def test_watching_a_launch_leaves_the_module_as_it_is(cache: Path) -> None:
    module = load(rendered("gate_sum_fwd"))
    launch, kernel = module.launch, module.gate_sum_fwd_kernel
    watched, seen = watch_launches(module)
    assert watched is not launch and seen == Launches()
    assert module.launch is launch and module.gate_sum_fwd_kernel is kernel
    assert watched.__defaults__ == launch.__defaults__ and watched.__code__ is launch.__code__


@pytest.mark.parametrize(
    ("mistake", "template", "words"),
    [
        ("kernel", "gate_sum_fwd.py.j2", "num_elemints is not defined"),
        ("macro", "common/attention.j2", "exp22"),
        ("launch", "cmp_pool_fwd.py.j2", "cdivv"),
    ],
)
def test_a_compile_error_names_the_template_line(
    compiled: dict[str, Any], mistake: str, template: str, words: str
) -> None:
    text = compiled[f"{mistake}_mistake"]
    assert "does not compile for cuda:90" in text and words in text
    assert re.search(rf"= templates/{re.escape(template)}:{compiled['lines'][mistake]}\b", text), text


def test_the_pool_tells_every_way_in_which_a_job_can_end(compiled: dict[str, Any]) -> None:
    outcomes = {(o["family"], o["status"]): o for o in compiled["pool"]}
    assert set(outcomes) == {
        ("gate_sum_fwd", "ok"),
        ("gate_sum_fwd", "constraint"),
        ("cmp_attn_fwd", "resource"),
        ("win_attn_fwd", "render"),
        ("killed", "crash"),
        ("hanging", "timeout"),
        ("buggy", "compile"),
    }
    assert len(compiled["pool"]) == 7  # one outcome a job
    assert outcomes["gate_sum_fwd", "ok"]["registers"] == compiled["cuda:90"]["registers"]
    assert "BLOCK=7 is not one of" in outcomes["gate_sum_fwd", "constraint"]["reason"]
    assert "limit_bytes=101376" in outcomes["cmp_attn_fwd", "resource"]["reason"]
    assert "exit code -11" in outcomes["killed", "crash"]["reason"]
    assert "time limit" in outcomes["hanging", "timeout"]["reason"]
    assert "ZeroDivisionError: a bug" in outcomes["buggy", "compile"]["reason"]


def test_the_pool_leaves_no_process_behind(compiled: dict[str, Any]) -> None:
    assert compiled["left_over"] == []


def test_ctrl_c_ends_the_pool_and_its_processes(tmp_path: Path) -> None:
    process = child(tmp_path, "forever")
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    deadline = time.monotonic() + 30
    while (children := _children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children == 2
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_pool_dies_with_its_parent(tmp_path: Path) -> None:
    process = child(tmp_path, "forever")
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(children := listing.read_text(encoding="utf-8").split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) == 2
    process.kill()
    process.wait()
    while any(_lives(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if _lives(pid)]


def _lives(pid: str) -> bool:
    """False for a process that is gone, or that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split())
