"""What of a compiled kernel is machine code: its identity, registers and stack, read from the binary.

Names, line tables, the assembler's text and the tool chain's notes are other sections of the ELF file and do not count.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import KernelError

__all__ = ["Usage", "join_shas", "machine_code_sha", "usage_of", "variant_code_sha"]

_HEADER = struct.Struct(
    "<32xQQ10xHHH"
)  # of the file; ends with offset, entry size, count, names of the section headers
_SECTION = struct.Struct("<II8xQQQ24x")  # name, type, offset, size between what is skipped
_CODE = re.compile(r"\.text(\.|$)|\.nv\.constant[23](\.|$)")  # instructions, and literals they read
_NO_BITS = 8  # type of a section without content
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info
_AMD_REGISTERS = re.compile(r"\.vgpr_count:\s*(\d+)")
_AMD_SPILLS = re.compile(r"\.vgpr_spill_count:\s*(\d+)")  # 4-byte words a thread


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a thread: registers, and bytes that live in memory instead."""

    registers: int
    spill_bytes: int  # NVIDIA: the stack frame; AMD: spilled vector registers


def machine_code_sha(kernel: Any) -> str:
    """Identity of a CompiledKernel's instructions, literals, registers, shared memory and warps; 64 hex digits.

    Equal for kernels that run alike, whatever they are called and whichever Triton made them. Raises KernelError.
    """
    binary = _binary(kernel)
    found = hashlib.sha256()
    for name, content in _sections(binary):
        if _CODE.match(name):
            found.update(struct.pack("<Q", len(content)) + content)
    metadata = kernel.metadata
    facts = (usage_of(kernel).registers, int(metadata.shared), int(metadata.num_warps))
    found.update(struct.pack("<3q", *facts))
    return found.hexdigest()


def variant_code_sha(kernels: Sequence[Any]) -> str:
    """`binary_sha` of a variant: over the kernels that its launch function returns, in order; 20 hex digits."""
    return join_shas([machine_code_sha(kernel) for kernel in kernels])


def join_shas(shas: Sequence[str]) -> str:
    """One identity of several kernels; 20 hex digits."""
    return hashlib.sha256("".join(shas).encode()).hexdigest()[:20]


def usage_of(kernel: Any) -> Usage:
    """Registers and spills of a CompiledKernel; raises KernelError if its binary does not tell them."""
    if "amdgcn" in kernel.asm:
        return _amd_usage(kernel.asm["amdgcn"])
    attributes = [pair for name, content in _sections(_binary(kernel)) if name == ".nv.info" for pair in _info(content)]
    registers = [value for attribute, value in attributes if attribute == _REGISTERS]
    if not registers:
        raise KernelError("a binary must tell its registers", {"attributes": sorted({a for a, _ in attributes})})
    return Usage(max(registers), max((value for attribute, value in attributes if attribute == _FRAME), default=0))


def _amd_usage(text: str) -> Usage:
    registers, spills = _AMD_REGISTERS.search(text), _AMD_SPILLS.search(text)
    if registers is None or spills is None:
        raise KernelError("a binary must tell its registers", {"tail": text[-300:]})
    return Usage(int(registers.group(1)), 4 * int(spills.group(1)))


def _binary(kernel: Any) -> bytes:
    for form in ("cubin", "hsaco"):
        if form in kernel.asm:
            return bytes(kernel.asm[form])
    raise KernelError("a compiled kernel must carry its binary", {"forms": sorted(kernel.asm)})


def _sections(binary: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of an ELF file's sections, in the file's order."""
    if len(binary) < 64 or binary[:6] != b"\x7fELF\x02\x01":
        raise KernelError("a binary must be a 64-bit ELF file", {"starts_with": binary[:6].hex()})
    _, offset, size, count, names = _HEADER.unpack_from(binary)
    headers = [_SECTION.unpack_from(binary, offset + size * index) for index in range(count)]
    strings = headers[names][3]
    found = []
    for name, kind, _, start, length in headers:
        end = binary.index(b"\0", strings + name)
        content = b"" if kind == _NO_BITS else binary[start : start + length]
        found.append((binary[strings + name : end].decode(), content))
    return found


def _info(content: bytes) -> list[tuple[int, int]]:
    """Attributes of .nv.info that name a function and a number: (attribute, number)."""
    found, at = [], 0
    while at + 4 <= len(content):
        kind, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if kind != 4:  # its value is the two bytes themselves
            continue
        if size == 8:
            found.append((attribute, struct.unpack_from("<II", content, at)[1]))
        at += size
    return found
