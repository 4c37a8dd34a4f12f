"""Texts of a shipped package that are about itself: metadata, readme, and the two modules that ours differ from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from string import Template

from ..db import WinnerRecord
from ..dispatch.shipped import ALLOW_VARIABLE
from ..spec import Problem

PACKAGES = ("codegen", "dispatch", "kernels", "nn", "ops")  # folders with modules of the runtime

SUMMARY = "Native Sparse Attention with Triton kernels tuned on"  # of a project, followed by its GPU

_PYPROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$project"
version = "$version"
description = "$summary $gpu"
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
dependencies = ["torch>=$torch", "triton>=$triton"]

[tool.setuptools]
include-package-data = false
packages = $packages

[tool.setuptools.package-data]
"$name" = ["*.json", "py.typed", "tuned/*.py", "binaries/*"]
""")

_INIT = Template('''\
"""Native Sparse Attention in Triton with kernels tuned on $gpu. Importing this touches no GPU."""

from __future__ import annotations

from .config import NSAConfig
from .dispatch.shipped import open_dispatcher
from .nn import KVCache, NativeSparseAttention
from .ops import nsa_attention

__version__ = "$version"
__all__ = ["KVCache", "NSAConfig", "NativeSparseAttention", "__version__", "nsa_attention", "open_dispatcher"]
''')

SOURCES = '''\
"""Where winners and kernels come from by default: the files of this package."""

from __future__ import annotations

from .shipped import default_kernels, default_winners

__all__ = ["default_kernels", "default_winners"]
'''

USUAL = {"batch": 1, "layout": "batched", "page_size": 64, "cache_dtype": "problem"}  # and NSAConfig(): not told

_README = Template("""\
# $project

Native Sparse Attention (arXiv 2502.11089) as a `torch.nn.Module`, with Triton kernels tuned on **$gpu**.
It needs torch >= $torch and triton >= $triton, nothing else. Made by `nsa-autotune ship` $tool_version.

```python
import torch
from $name import NativeSparseAttention

attention = NativeSparseAttention(hidden_size=$hidden, num_q_heads=$heads, num_kv_heads=$kv_heads, d_qk=$d_qk, d_v=$d_v)
attention = attention.to("cuda", torch.bfloat16)
x = torch.randn(1, 8192, $hidden, device="cuda", dtype=torch.bfloat16)
y = attention(x)  # [B, T, hidden_size]; on the CPU it computes the equations
```

On another GPU it raises an error, unless `open_dispatcher(allow_other_gpu=True)` is passed as `dispatcher=`, or
$variable=1 is set. A problem between the tuned ones is served by the nearest, which is logged once;
one that no kernel here can serve raises an error.
$binaries
## What is in it
`$name/tuned/` holds the kernels as readable Python, `$name/dispatch.json` says which serves what, and
`$name/PROVENANCE.json` names the rows of the tuning database, digests of all files, and for $gated of the $count
winners the errors that their accuracy gate measured (of the others the database holds no trial).

| family | problem | median, us | default config, us | verdict | measured with |
|---|---|---:|---:|---|---|
$rows
""")


def pyproject(name: str, version: str, gpu: str, bounds: dict[str, str]) -> str:
    """The package's pyproject.toml; `bounds` are the oldest versions of torch and triton."""
    packages = json.dumps([name, *(f"{name}.{part}" for part in PACKAGES)])
    return _PYPROJECT.substitute(
        project=name.replace("_", "-"),
        name=name,
        version=version,
        gpu=gpu,
        packages=packages,
        summary=SUMMARY,
        **bounds,
    )


def init_module(version: str, gpu: str) -> str:
    """The package's `__init__.py`."""
    return _INIT.substitute(version=version, gpu=gpu)


def readme(
    name: str,
    gpu: str,
    tool_version: str,
    bounds: dict[str, str],
    winners: Sequence[WinnerRecord],
    targets: list[str],
    gated: int,
) -> str:
    """What the package is, how it is used, and a row for each winner; the errors of `gated` of them are known."""
    shape = max(winners, key=lambda w: int(w.problem["num_q_heads"])).problem
    fields = {field: shape[field] for field in ("d_qk", "d_v")}
    used = "They serve under the Triton that made them, named in its `index.json`; another one compiles, and says so."
    binaries = f"\nCompiled binaries for {', '.join(targets)} are in `{name}/binaries/`. {used}\n" if targets else ""
    return _README.substitute(
        project=name.replace("_", "-"),
        name=name,
        gpu=gpu,
        tool_version=tool_version,
        variable=ALLOW_VARIABLE,
        gated=gated,
        count=len(winners),
        hidden=shape["num_q_heads"] * shape["d_v"],
        heads=shape["num_q_heads"],
        kv_heads=shape["num_kv_heads"],
        binaries=binaries,
        rows="\n".join(_row(winner) for winner in winners),
        **fields,
        **bounds,
    )


def _row(winner: WinnerRecord) -> str:
    key, usual = json.loads(winner.problem_key), Problem()
    told = {name: value for name, value in key.items() if name != "nsa" and value != USUAL.get(name)}
    constants = usual.nsa.to_dict()
    told |= {name: value for name, value in key["nsa"].items() if value != constants[name]}
    text = ", ".join(f"{name} {value}" for name, value in told.items())
    default = "" if winner.default_median_us is None else f"{winner.default_median_us:.1f}"
    versions = f"torch {winner.fingerprint['torch']}, Triton {winner.fingerprint['triton']}"
    return f"| {winner.family} | {text} | {winner.median_us:.1f} | {default} | {winner.verdict} | {versions} |"
