"""A shipped package: what is in it, and that it serves the same bits where nothing of ours is installed."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu import ship_child
from cpu.test_layers import imported_parts

from nsa_autotune.cli.app import main
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.config import NSAConfig
from nsa_autotune.db import TrialRecord, TuningStore, WinnerRecord
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.ladder import Step, choose
from nsa_autotune.dispatch.shipped import read_table
from nsa_autotune.errors import InvalidInput, StoreError, UnknownName
from nsa_autotune.kernels import FUSED, all_specs, get_spec
from nsa_autotune.ops import whole
from nsa_autotune.search.presets import tuning_problems
from nsa_autotune.ship.choice import choose_gpu, choose_winners
from nsa_autotune.ship.compiled import BRANCHES, alike_problems, call_arguments
from nsa_autotune.ship.contents import check_name, check_replaces_nothing, default_name, lower_bounds
from nsa_autotune.spec import Config, KernelSpec, Problem

TESTS = Path(__file__).parents[1]
NAME = "nsa_tuned_h100_80gb_hbm3"
CONFIG = NSAConfig(**ship_child.CONSTANTS, window_size=32)
DIMS: dict[str, Any] = {"num_q_heads": 2, "num_kv_heads": 1, "phi_hidden": 16, "nsa": CONFIG}
PROBLEM = Problem(seq_q=64, seq_k=64, d_qk=16, d_v=16, dtype="float32", **DIMS)
STEP = PROBLEM.replace(layout="paged", seq_q=1)  # a decode step


def other_config(spec: KernelSpec, problem: Problem) -> Config:
    """A legal config whose tiles are not the default's, so that its sums are taken in another order."""
    default = spec.default_config(problem)
    for name in sorted(default, key=lambda name: (name != "BLOCK_N", name != "BLOCK_T", name)):
        param = next(param for param in spec.params if param.name == name)
        for value in param.values:
            config = {**default, name: value}
            if config != default and spec.broken_constraint(problem, config) is None:
                return config
    return default


def make_winner(spec: KernelSpec, problem: Problem, **changes: Any) -> WinnerRecord:
    record = WinnerRecord(
        fingerprint=ship_child.FINGERPRINT,
        family=spec.family,
        problem=problem.to_dict(),
        problem_key=spec.problem_key(problem),
        config=other_config(spec, problem),
        template_digest=template_digest(spec),
        median_us=120.0,
        p20_us=118.0,
        p80_us=125.0,
        samples_us=(118.0, 120.0, 125.0),
        default_config=spec.default_config(problem),
        default_median_us=240.0,
        created="2026-01-02T03:04:05.000000+00:00",
    )
    return replace(record, **changes)


@pytest.fixture(autouse=True, scope="module")
def nothing_shipped() -> Iterator[None]:
    """Databases hold what a test puts there, whatever the repository ships."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_autotune.db.store.shipped_files", dict)
        yield


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database: a winner of each family for one problem, others of other GPUs, lengths and templates, and a trial."""
    url = f"sqlite:///{tmp_path_factory.mktemp('db') / 'tuning.sqlite'}"
    window = get_spec("win_attn_fwd")
    served = [(spec, problem) for problem in (PROBLEM, STEP) for spec in all_specs().values()]
    winners = [make_winner(spec, part) for spec, problem in served for part in tuning_problems(spec, problem)[:1]]
    h200 = {**ship_child.FINGERPRINT, "gpu": "NVIDIA H200"}
    winners += [
        make_winner(window, PROBLEM, fingerprint=h200, config=window.default_config(PROBLEM)),
        make_winner(window, PROBLEM.replace(seq_q=4096, seq_k=4096)),
        make_winner(window, PROBLEM.replace(d_qk=32, d_v=32), template_digest="an older template"),
        make_winner(window, PROBLEM, fingerprint={**ship_child.FINGERPRINT, "gpu": "target cuda:90"}),
    ]
    tried = next(winner for winner in winners if winner.family == "slc_attn_fwd")
    shared = {name: getattr(tried, name) for name in ("family", "problem", "problem_key", "config", "template_digest")}
    trial = TrialRecord(fingerprint=ship_child.FINGERPRINT, **shared, status="ok", max_error=0.25, baseline_error=0.5)
    with TuningStore(url, import_shipped=False) as store:
        for winner in winners:
            store.set_winner(winner)
        store.add_trial(trial)
    return url


def ship(url: str, out: Path, *more: str) -> Path:
    """The folder of a package that the command line made."""
    assert main(["ship", "--gpu", "h100", "--db", url, "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def project(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ship(url, tmp_path_factory.mktemp("ship") / "project")


def install(project: Path, target: Path) -> Path:
    """The package as pip installs it, without its dependencies and without a network."""
    copy = shutil.copytree(project, target.with_name(f"{target.name}-copy"))  # pip builds inside of a project
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    where = ["--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *where, str(copy)], check=True)
    return target


@pytest.fixture(scope="module")
def installed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(project, tmp_path_factory.mktemp("installed"))


def in_child(installed: Path, what: str, tmp_path: Path, *, interpret: bool = True) -> Any:
    """What a function of ship_child returns in a process that has none of our packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NSA_", "TRITON_"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(installed), str(TESTS)]), "HOME": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, str(TESTS / "cpu" / "ship_child.py"), NAME, what, str(tmp_path / "result")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result", weights_only=False)


def same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


# in an environment of its own


def test_the_module_gives_our_bits_on_the_cpu(installed: Path, tmp_path: Path) -> None:
    same_bits(in_child(installed, "module", tmp_path), ship_child.module("nsa_autotune"))


def test_the_kernels_give_our_bits(installed: Path, url: str, tmp_path: Path) -> None:
    """Forward and backward through both dispatchers in Triton's interpreter; every family is served by its winner."""
    found = in_child(installed, "kernels", tmp_path)
    with TuningStore(url) as store:
        ours = Dispatcher(store, fingerprint=ship_child.pretended("nsa_autotune"))
        same_bits(found, ship_child.kernels("nsa_autotune", ours))
    assert set(found["steps"]) == {"exact winner"} and found["steps"]["exact winner"] >= 13  # window and sum are one
    equations = ship_child.module("nsa_autotune")
    for name in ("y", "dx"):
        assert not torch.equal(found[name], equations[name]), "kernels ran, not the equations"
        torch.testing.assert_close(found[name], equations[name], rtol=1e-3, atol=1e-4)


def test_only_torch_and_triton_are_needed(installed: Path, tmp_path: Path) -> None:
    loaded = in_child(installed, "imported", tmp_path)
    assert NAME in loaded and "torch" in loaded
    assert not set(ship_child.BLOCKED) & set(loaded)


def test_who_is_served(installed: Path, tmp_path: Path) -> None:
    found = in_child(installed, "served", tmp_path)
    assert found["same"] == "exact winner"
    for case in ("other", "other, variable 0"):
        assert found[case].startswith("OtherGPU: this package serves the GPU that its kernels were tuned on"), case
        assert "'NVIDIA H200'" in found[case] and "allow_other_gpu=True" in found[case]
        assert "NSA_TUNED_ALLOW_OTHER_GPU=1" in found[case]
    for case in ("other, allowed", "other, by variable"):
        assert found[case] == "winner on another GPU of this architecture"
    assert found["other, variable yes"].startswith("InvalidInput: NSA_TUNED_ALLOW_OTHER_GPU is 1 or 0")
    assert found["other architecture, allowed"] == "default config"
    assert found["longer"] == "winner of the nearest problem on this GPU"
    for case in ("other heads", "other head dim"):
        assert found[case].startswith("NotShipped: no kernel of this package serves the problem"), case
        assert "nsa-autotune ship" in found[case]
    assert found["no kernel could"].startswith("InvalidProblem")


def test_both_serve_in_one_process(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators have their package's namespace, and a dispatcher's number means nothing to the other package."""
    monkeypatch.syspath_prepend(installed)
    theirs = ship_child.module(NAME)
    same_bits(theirs, ship_child.module("nsa_autotune"))
    same_bits(theirs, ship_child.module(NAME))
    names = {str(handle.default).partition(".")[0] for space in (NAME, "nsa_autotune") for handle in operators(space)}
    assert names == {NAME, "nsa_autotune"}


def operators(namespace: str) -> list[Any]:
    """The custom operators of a package."""
    space = getattr(torch.ops, namespace)
    return [getattr(space, name) for name in ("compress", "attend", "select_blocks", "combine", "gated_attention")]


# with compiled binaries


def test_binaries_are_made_for_all_ways_of_a_call() -> None:
    """Strides, alignments and switches of the backward's calls; by Triton's rules each is a binary of its own."""
    assert BRANCHES == whole.BRANCHES
    for branch, place in (("cmp", 0), ("slc", 1), ("win", 2)):
        spec = get_spec(f"{branch}_attn_bwd_dq")
        alone, fused = call_arguments(spec, PROBLEM)
        assert alone["gate"].is_contiguous() and "accumulate" not in alone
        assert fused["gate"].stride()[-1] == 3 and fused["gate"].storage_offset() == place
        assert fused["accumulate"] is (branch != "win")
    assert len(call_arguments(get_spec("slc_attn_fwd"), PROBLEM)) == 1
    assert ("accumulate" in call_arguments(get_spec("win_attn_bwd_dkv"), PROBLEM)[1]) is False
    sizes = {(p.batch, p.seq_q, p.seq_k) for p in alike_problems(PROBLEM)}
    assert sizes == {(1, 64, 64), (2, 64, 64), (1, 63, 63), (2, 63, 63)}


def test_binaries_start_without_the_compiler(tmp_path: Path) -> None:
    """On a stub driver: a shape that was compiled is launched; another one asks for the compiler, which is gone."""
    window = get_spec("win_attn_fwd")
    config = NSAConfig(window_size=32)
    problem = Problem(batch=2, seq_q=128, seq_k=128, d_qk=32, d_v=32, dtype="float16", **{**DIMS, "nsa": config})
    winner = make_winner(window, problem, config={**window.default_config(problem), "use_tma": True})
    url = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    with TuningStore(url, import_shipped=False) as store:
        store.set_winner(winner)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--gpu", "H100", "--db", url, "--aot", "cuda:90,cuda:80", "--families", "win_attn_fwd"]
    command = [sys.executable, "-m", "nsa_autotune", "ship", *options, "--out", str(tmp_path / "project")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "cannot load the binaries for cuda:80" in done.stderr and "for cuda:90\n" not in done.stderr
    check_nothing_of_this_machine(tmp_path / "project")
    installed = install(tmp_path / "project", tmp_path / "installed")
    found = in_child(installed, "binaries", tmp_path, interpret=False)
    assert (found["tuned"], found["longer"], found["probe"]) == (1, 1, 2)
    assert found["steps"][:2] == ["exact winner", "winner of the nearest problem on this GPU"]
    assert "the compiler ran" in found["odd strides"]
    assert "the compiler ran" in found["newer"]
    assert len(found["said"]) == 2, "each dispatcher says it once"
    assert "no shipped binary fits" in found["said"][0] and "binaries are of Triton 0.0" in found["said"][1]


# what is in it


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_nothing_of_this_machine(project: Path) -> None:
    known = {str(Path.home()), str(TESTS.parent), sys.prefix, tempfile.gettempdir()}
    known |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4}  # others are words
    for name, content in files_of(project).items():
        assert not [text for text in known if text.encode() in content], name


def test_two_builds_are_equal(url: str, project: Path, tmp_path: Path) -> None:
    files = files_of(ship(url, tmp_path / "again"))
    assert files == files_of(project)
    check_nothing_of_this_machine(project)


def test_what_a_package_is_made_of(project: Path) -> None:
    assert sorted(path.name for path in project.iterdir()) == ["LICENSE", "README.md", NAME, "pyproject.toml"]
    text = (project / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.11.0", "triton>=3.6.0"]' in text
    table = read_table(project / NAME)
    assert table.gpu == "NVIDIA H100 80GB HBM3" and set(table.templates) == set(all_specs())
    assert {path.name for path in (project / NAME / "tuned").iterdir()} == set(table.kernels.values())
    windows = table.winners(family="win_attn_fwd")
    assert sorted(row.problem["seq_k"] for row in windows) == [64, 4096]
    assert {row.fingerprint["gpu"] for row in table.rows} == {table.gpu}


def test_the_provenance_names_rows_errors_and_digests(project: Path, url: str) -> None:
    import hashlib

    told = json.loads((project / NAME / "PROVENANCE.json").read_text())
    with TuningStore(url) as store:
        known = {winner.digest: winner.to_dict() for winner in store.winners()}
    assert all(known[row["digest"]] == row["record"] for row in told["winners"])
    gates = {row["record"]["family"]: row["gate"] for row in told["winners"]}
    assert gates["slc_attn_fwd"] == {"max_error": 0.25, "baseline_error": 0.5} and gates["cmp_attn_fwd"] is None
    assert "below 2 times PyTorch's" in told["tolerance"]
    for path, sha in told["sha256"].items():
        assert hashlib.sha256((project / path).read_bytes()).hexdigest() == sha


def test_the_runtime_imports_nothing_that_stays_behind(project: Path) -> None:
    """Read from the sources, lazy imports too: each names a module of the package."""
    package = project / NAME
    for path in sorted(package.rglob("*.py")):
        if "tuned" not in path.parts:
            for line, part in imported_parts(path, package):
                there = (package / part).is_dir() or (package / f"{part}.py").is_file() or part == "codegen"
                assert there, f"{path}:{line} {part}"
    assert not list(package.glob("**/render.py")) and not (package / "db").exists()


@pytest.mark.parametrize(
    ("options", "seqs"),
    [
        (["--seq", "4k"], {4096}),
        (["--problem", "seq_k=4k"], {4096}),
        (["--problem", "d_qk=16", "--problem", "window_size=32"], {64, 4096}),
        (["--families", "win_attn_fwd", "--seq", "64"], {64}),
    ],
)
def test_filters(url: str, tmp_path: Path, options: list[str], seqs: set[int]) -> None:
    table = read_table(ship(url, tmp_path / "out", *options) / NAME)
    assert {row.problem["seq_k"] for row in table.rows} == seqs
    layouts = {row.problem["layout"] for row in table.rows}
    families = {family for family, spec in all_specs().items() if layouts & set(spec.layouts) and family not in FUSED}
    families |= {row.family for row in table.rows}  # a fused one needs a winner
    families = {"win_attn_fwd"} if "--families" in options else families
    assert set(table.templates) == families  # default kernels of the others serve the model


def test_families_without_a_winner_are_named(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in ((["--families", "win_attn_fwd,cmp_attn_fwd"], "for cmp_attn_fwd: the default"), ([], "")):
        gpu = "NVIDIA H200" if told else "h100"
        assert main(["ship", "--gpu", gpu, "--db", url, "--out", str(tmp_path / gpu), *options]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert f"no winner of NVIDIA H200 {told}" in said if told else "no winner of" not in said


# mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "B200"], "no GPU with winners has this in its name"),
        (["--gpu", "NVIDIA"], "--gpu fits more than one GPU"),
        (["--gpu", "target"], "no GPU with winners has this in its name"),
        (["--gpu", "H100", "--name", "torch-like"], "a package needs a name that Python can import"),
        (["--gpu", "H100", "--name", "nsa_autotune"], "must not hide what it needs"),
        (["--gpu", "H100", "--name", "numpy"], "which the package would replace"),
        (["--gpu", "H100", "--aot", "cuda:91"], "no such compilation target"),
        (["--gpu", "H100", "--seq", "1k"], "a package needs a winner of the present templates"),
        (["--gpu", "H100", "--preset", "tiny"], "a package needs a winner of the present templates"),
        (["--gpu", "H100", "--problem", "seq_k=banana"], "Look at what there is with `nsa-autotune db best"),
        (["--gpu", "H100", "--problem", "d_qk=32"], "of them stale=1"),
        (["--gpu", "H100", "--problem", "heads=4"], "a problem has no such field"),
        (["--gpu", "H100", "--families", "win_fwd"], "no such kernel family"),
        (["--gpu", "H100", "--aot", "cuda:90"], "compilation needs the compiler"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_a_sentence_and_writes_nothing(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["ship", "--db", url, "--out", str(tmp_path / "out"), *options]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        assert main(["ship", "--gpu", "H100", "--db", url, "--out", str(out)]) == 2
        assert "a new or an empty folder" in capsys.readouterr().err
    assert files_of(tmp_path) == {"mine.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    ship(url, tmp_path / "empty")


def test_a_folder_that_cannot_be_made_leaves_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["ship", "--gpu", "H100", "--db", url, "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [lambda text: text[:-40], lambda text: text.replace('"schema": 1', '"schema": 2'), lambda text: "[]"],
    ids=["cut", "newer", "other"],
)
def test_a_damaged_table_is_refused(project: Path, tmp_path: Path, change: Any) -> None:
    (tmp_path / "dispatch.json").write_text(change((project / NAME / "dispatch.json").read_text()))
    with pytest.raises(StoreError, match="Install the package anew"):
        read_table(tmp_path)


# decisions


def test_a_gpu_is_named_by_a_part_or_in_full() -> None:
    known = ["NVIDIA H100 80GB HBM3", "NVIDIA H100", "NVIDIA H200"]
    assert choose_gpu(known, "h200") == "NVIDIA H200"
    assert choose_gpu(known, "NVIDIA H100") == "NVIDIA H100"
    with pytest.raises(InvalidInput, match="fits more than one"):
        choose_gpu(known, "H100")
    with pytest.raises(UnknownName, match="GPUs with winners: none"):
        choose_gpu([], "H100")
    with pytest.raises(UnknownName):
        choose_gpu(known, "")


def test_the_newest_winner_of_a_problem_is_shipped() -> None:
    spec = get_spec("win_attn_fwd")
    old = make_winner(spec, PROBLEM)
    driver = {**ship_child.FINGERPRINT, "driver": "2"}
    new = replace(old, fingerprint=driver, created="2026-02-01T00:00:00.000000+00:00")
    graph = replace(old, policy="graph-cold")
    for order in ([old, new, graph], [graph, new, old]):
        chosen = choose_winners(order, "NVIDIA H100 80GB HBM3", lambda spec, winner: True)
        assert set(map(id, chosen.winners)) == {id(new), id(graph)}


def test_a_winner_without_a_kernel_is_passed_over() -> None:
    spec = get_spec("win_attn_fwd")
    here = ship_child.pretended("nsa_autotune")
    exact = make_winner(spec, PROBLEM)
    longer = make_winner(spec, PROBLEM.replace(seq_q=4096, seq_k=4096), config=spec.default_config(PROBLEM))
    given = (spec, PROBLEM, [exact, longer], here, exact.template_digest)
    assert choose(*given).config == exact.config
    passed = choose(*given, can_serve=lambda config: config != exact.config)
    assert (passed.step, passed.config) == (Step.NEAREST, longer.config)


def test_names_and_versions() -> None:
    assert default_name("NVIDIA H100 80GB HBM3") == NAME and default_name("Tesla-V100") == "nsa_tuned_tesla_v100"
    for bad in ("", "import", "1a", "a-b", "../x", "A", "a b"):
        with pytest.raises(InvalidInput, match="that Python can import"):
            check_name(bad)
    for taken in ("torch", "triton", "nsa_autotune", "json", "asyncio"):
        with pytest.raises(InvalidInput, match=f"must not hide.*{taken}"):
            check_name(taken)
    spec = get_spec("win_attn_fwd")
    newer = {**ship_child.FINGERPRINT, "torch": "2.9.1", "triton": "3.10.0"}
    both = [make_winner(spec, PROBLEM), make_winner(spec, PROBLEM, fingerprint=newer)]
    assert lower_bounds(both) == {"torch": "2.11.0", "triton": "3.10.0"}


def test_a_package_replaces_only_one_that_was_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, project, summary in (
        ("other_attention", "other-attention", "Another program"),
        ("nsa_tuned_h100", "nsa-tuned-h100", "Native Sparse Attention with Triton kernels tuned on NVIDIA H100"),
    ):
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\nSummary: {summary}\n")
        (facts / "top_level.txt").write_text(f"{name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for taken in ("other_attention", "numpy", "yaml", "pyyaml"):
        with pytest.raises(InvalidInput, match=f"would replace.*{taken}"):
            check_replaces_nothing(taken)
    check_replaces_nothing("nsa_tuned_h100")
    check_replaces_nothing("nsa_tuned_b200")
