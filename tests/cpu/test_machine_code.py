"""Identity and resources of compiled kernels, read from real binaries of a child process that may compile."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from nsa_autotune.codegen.machine_code import join_shas, machine_code_sha, usage_of, variant_code_sha
from nsa_autotune.errors import KernelError

KERNEL = '''
@triton.jit
def {name}(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """{doc}"""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, tl.sort(x) + {term}, mask=offs < n)
'''
LABELS = "plain,renamed,other tile,other sum,other warps,tight,ampere,amd"
COMPILE = """
import base64, json, sys
from triton.backends.compiler import GPUTarget
from kernels import *
signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
seen = {}
for label, fn, block, options, target in (
    ("plain", first, 256, {}, ("cuda", 90, 32)),
    ("renamed", another_name, 256, {}, ("cuda", 90, 32)),
    ("other tile", first, 512, {}, ("cuda", 90, 32)),
    ("other sum", other_sum, 256, {}, ("cuda", 90, 32)),
    ("other warps", first, 256, {"num_warps": 8}, ("cuda", 90, 32)),
    ("tight", first, 2048, {"maxnreg": 24}, ("cuda", 90, 32)),
    ("ampere", first, 256, {}, ("cuda", 80, 32)),
    ("amd", first, 256, {}, ("hip", "gfx942", 64)),
):
    if label not in sys.argv[1].split(","):
        continue
    source = triton.compiler.ASTSource(fn, signature, {"BLOCK": block})
    kernel = triton.compile(source, target=GPUTarget(*target), options=options)
    form = "hsaco" if target[0] == "hip" else "cubin"
    seen[label] = {
        "form": form,
        "binary": base64.b64encode(kernel.asm[form]).decode(),
        "text": kernel.asm.get("amdgcn", ""),
        "shared": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
    }
print(json.dumps(seen))
"""


def compile_all(folder: Path, labels: str, **environment: str) -> dict[str, Any]:
    """The kernels of COMPILE that are named, as stand-ins for Triton's CompiledKernel."""
    folder.mkdir()
    head = "import triton\nimport triton.language as tl\n"
    named = KERNEL.format(name="another_name", doc="A longer text moves the lines.\n\n", term="1.0")
    other = KERNEL.format(name="other_sum", doc="", term="2.0")
    (folder / "kernels.py").write_text(head + KERNEL.format(name="first", doc="", term="1.0") + named + other)
    (folder / "compile_them.py").write_text(COMPILE)
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "compile_them.py", labels],
        cwd=folder,
        env={**inherited, "TRITON_CACHE_DIR": str(folder / "triton"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {label: stand_in(told) for label, told in json.loads(done.stdout.splitlines()[-1]).items()}


def stand_in(told: dict[str, Any]) -> SimpleNamespace:
    """What the functions read of a CompiledKernel."""
    asm = {told["form"]: base64.b64decode(told["binary"])}
    if told["text"]:
        asm["amdgcn"] = told["text"]
    return SimpleNamespace(asm=asm, metadata=SimpleNamespace(shared=told["shared"], num_warps=told["num_warps"]))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compiled as usual."""
    return compile_all(tmp_path_factory.mktemp("code") / "usual", LABELS)


@pytest.fixture(scope="module")
def without_lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same without line tables."""
    return compile_all(tmp_path_factory.mktemp("code") / "plain", "plain,amd", TRITON_DISABLE_LINE_INFO="1")


def test_names_and_line_tables_are_no_part_of_the_code(kernels: dict[str, Any], without_lines: dict[str, Any]) -> None:
    plain, renamed, bare = kernels["plain"], kernels["renamed"], without_lines["plain"]
    assert len({kernel.asm["cubin"] for kernel in (plain, renamed, bare)}) == 3  # the files differ
    assert machine_code_sha(plain) == machine_code_sha(renamed) == machine_code_sha(bare)
    assert machine_code_sha(kernels["amd"]) == machine_code_sha(without_lines["amd"])


def test_other_instructions_are_another_code(kernels: dict[str, Any]) -> None:
    labels = [label for label in kernels if label != "renamed"]
    assert len({machine_code_sha(kernels[label]) for label in labels}) == len(labels)


def test_shared_memory_and_warps_count_though_the_instructions_are_the_same(kernels: dict[str, Any]) -> None:
    plain = kernels["plain"]
    shas = {machine_code_sha(plain)}
    for change in ({"shared": plain.metadata.shared + 16}, {"num_warps": 2}):
        metadata = SimpleNamespace(**{**vars(plain.metadata), **change})
        shas.add(machine_code_sha(SimpleNamespace(asm=plain.asm, metadata=metadata)))
    assert len(shas) == 3


@pytest.mark.parametrize("label", ["plain", "other tile", "tight", "ampere"])
def test_registers_and_stack_are_those_of_the_disassembler(kernels: dict[str, Any], label: str, tmp_path: Path) -> None:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernels[label].asm["cubin"])
    text = subprocess.run([str(tool), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    assert found is not None, text
    usage = usage_of(kernels[label])
    assert (usage.registers, usage.spill_bytes) == (int(found.group(1)), int(found.group(2)))
    assert (usage.spill_bytes > 0) == (label == "tight")


def test_registers_of_amd_are_read_from_its_assembly() -> None:
    text = "amdhsa.kernels:\n  - .agpr_count: 0\n    .vgpr_count:     112\n    .vgpr_spill_count: 3\n"
    usage = usage_of(SimpleNamespace(asm={"amdgcn": text}))
    assert (usage.registers, usage.spill_bytes) == (112, 12)


def test_a_variant_is_the_sequence_of_its_kernels(kernels: dict[str, Any]) -> None:
    one, two = kernels["plain"], kernels["other tile"]
    assert variant_code_sha([one, two]) == join_shas([machine_code_sha(one), machine_code_sha(two)])
    assert len({variant_code_sha(order) for order in ([one], [one, two], [two, one])}) == 3
    assert re.fullmatch("[0-9a-f]{20}", variant_code_sha([one]))


@pytest.mark.parametrize(
    ("asm", "words"),
    [
        ({"ptx": "text"}, "must carry its binary"),
        ({"cubin": b"\x7fELF\x01\x01"}, "64-bit ELF"),
        ({"cubin": b"PK" * 40}, "64-bit ELF"),
        ({"amdgcn": "s_endpgm"}, "must tell its registers"),
    ],
)
def test_what_is_no_binary_is_refused(asm: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        usage_of(SimpleNamespace(asm=asm, metadata=SimpleNamespace(shared=0, num_warps=4)))
