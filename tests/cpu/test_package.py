"""What the package promises as files: pairs of template and spec, sizes, a quick import, and what a wheel holds."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "templates").rglob("*.j2"))
MODULES = sorted((ROOT / "nsa_autotune").rglob("*.py"))
MAX_MODULE_LINES = 300
MAX_TEMPLATE_LINES = 250
HEAVY = ("torch", "triton", "optuna", "sqlalchemy", "alembic", "jinja2", "typer", "rich")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


def test_every_template_has_a_spec_and_every_spec_a_template() -> None:
    from nsa_autotune.kernels import all_specs

    templates = {path.name.removesuffix(".py.j2") for path in (ROOT / "templates").glob("*.py.j2")}
    spec_files = {path.stem for path in (ROOT / "nsa_autotune" / "kernels").glob("*.py") if path.stem[0] != "_"}
    assert templates == set(all_specs())
    assert templates <= spec_files


@pytest.mark.parametrize("path", TEMPLATES, ids=relative)
def test_no_template_swallows_whitespace(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "{%-" not in text and "-%}" not in text, "the dash forms swallow the line before or after"


@pytest.mark.parametrize("path", TEMPLATES, ids=relative)
def test_templates_stay_short(path: Path) -> None:
    assert line_count(path) <= MAX_TEMPLATE_LINES


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_stay_short_and_start_with_their_purpose(path: Path) -> None:
    assert line_count(path) <= MAX_MODULE_LINES
    assert path.read_text(encoding="utf-8").startswith('"""'), "the first line says what the module is for"


def test_import_loads_nothing_heavy() -> None:
    loaded = json.loads(run_python("import json, sys, nsa_autotune; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in HEAVY if name in loaded] == []


def test_specs_are_data_and_need_no_torch() -> None:
    """Who asks the database or renders a kernel does not wait seconds for it."""
    code = "import sys; from nsa_autotune.kernels import all_specs; all_specs(); print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_public_names_touch_neither_gpu_nor_search_nor_database() -> None:
    code = (
        "import json, sys, torch\n"
        "from nsa_autotune import NativeSparseAttention, NSAConfig, nsa_attention\n"
        "heavy = [n for n in ('optuna', 'typer') if n in sys.modules]\n"
        "print(json.dumps([torch.cuda.is_initialized(), heavy]))\n"
    )
    assert json.loads(run_python(code)) == [False, []]


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import nsa_autotune

    with pytest.raises(AttributeError, match="no attribute 'NativeSparseAtention'"):
        _ = nsa_autotune.NativeSparseAtention
    assert set(dir(nsa_autotune)) == set(nsa_autotune.__all__)


def test_the_wheel_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    mapped = set(project["tool"]["setuptools"]["package-dir"]) - {"nsa_autotune"}
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert listed == folders | mapped


def test_every_template_is_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["nsa_autotune.templates"]
    templates = ROOT / "templates"
    shipped = {path for pattern in patterns for path in templates.glob(pattern)}
    assert set(TEMPLATES) <= shipped


def test_shipped_winners_and_their_sources_are_the_same_variants() -> None:
    from nsa_autotune.codegen.load import source_path
    from nsa_autotune.codegen.render import render
    from nsa_autotune.kernels import get_spec
    from nsa_autotune.spec import Problem

    for table in sorted((ROOT / "tuning_db").glob("*.jsonl")):
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        winners = [row for row in rows if row["record"] == "winner"]
        rendered = [render(get_spec(w["family"]), Problem.from_dict(w["problem"]), w["config"]) for w in winners]
        wanted = {source_path(each).name: each.source for each in rendered}
        folder = ROOT / "kernels_generated" / "winners" / table.stem
        found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
        assert rendered and set(found) == set(wanted), "run scripts/ship_winners.py and add what it writes"
        assert found == wanted
