"""Numbers, shapes and dates as the page writes them; plain text, which the template escapes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from ..config import NSAConfig
from ..spec import KernelSpec, Problem

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHORT_CONSTANTS = {
    "compress_block_size": "l",
    "compress_stride": "d",
    "select_block_size": "l'",
    "num_selected": "n",
    "window_size": "w",
}


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def time_text(time_us: float) -> str:
    """Microseconds with the unit that reads best."""
    if time_us < 999.5:
        return f"{digits(time_us)} µs"
    return f"{digits(time_us / 1e3)} ms" if time_us < 999.5e3 else f"{digits(time_us / 1e6)} s"


def tokens_text(tokens: int) -> str:
    """65536 as 64k."""
    if tokens >= 1 << 20 and tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def date_text(created: str) -> str:
    """The day of an ISO 8601 time."""
    return datetime.fromisoformat(created).date().isoformat()


def dtype_text(dtype: str) -> str:
    """bfloat16 as bf16."""
    return SHORT_DTYPES.get(dtype, dtype)


def shape_text(problem: Problem, spec: KernelSpec | None = None) -> str:
    """Heads, dims and what is unusual, without tokens and dtype; only fields that make a difference to the family.

    Without a family all of them but the locality.
    """
    fields = set(spec.problem_fields) if spec is not None else set(problem.to_dict()) - {"locality"}
    dims = f"{problem.d_qk}" if problem.d_qk == problem.d_v or "d_v" not in fields else f"{problem.d_qk}/{problem.d_v}"
    parts = [f"B {problem.batch}"] if problem.batch != 1 else []
    parts += [f"{problem.seq_q} queries"] if problem.seq_q != problem.seq_k else []
    parts += [f"HQ {problem.num_q_heads}"] if "num_q_heads" in fields else []
    parts += [f"H {problem.num_kv_heads}", f"d {dims}"]
    parts += [f"locality {problem.locality:g}"] if "locality" in fields else []
    parts += [f"phi {problem.phi_hidden}"] if "phi_hidden" in fields and problem.phi_hidden != 128 else []
    parts += ["packed"] if problem.layout == "packed" else []
    parts += [paged_text(problem.page_size, problem.cache_dtype)] if problem.layout == "paged" else []
    usual = NSAConfig().to_dict()
    names = spec.nsa_fields if spec is not None else tuple(usual)
    constants = problem.nsa.to_dict()
    parts += [f"{SHORT_CONSTANTS.get(n, n)} {constants[n]}" for n in names if constants[n] != usual[n]]
    return ", ".join(parts)


def paged_text(page_size: int, cache_dtype: str) -> str:
    """What is unusual about a paged cache."""
    parts = ["paged"] + ([f"by {page_size}"] if page_size != 64 else []) + (["fp8"] if cache_dtype != "problem" else [])
    return " ".join(parts)


def short_versions_text(fingerprint: Mapping[str, str]) -> str:
    """The two versions that matter most."""
    found = [
        f"{label} {fingerprint[name]}"
        for name, label in (("torch", "torch"), ("triton", "Triton"))
        if fingerprint.get(name)
    ]
    return ", ".join(found)


def versions_text(fingerprint: Mapping[str, str], tool_version: str) -> str:
    """Software of a measurement on one line, what is unknown left out."""
    names = {"torch": "torch", "triton": "Triton", "cuda": "CUDA", "driver": "driver", "assembler": ""}
    found = [f"{label} {fingerprint[name]}".strip() for name, label in names.items() if fingerprint.get(name)]
    return ", ".join([*found, f"nsa-autotune {tool_version}"])
