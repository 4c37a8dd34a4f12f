"""Exceptions of a trial to statuses, by what was raised and in which stage."""

from __future__ import annotations

from collections.abc import Iterator

from .result import Status

RESOURCE = {"OutOfResources", "OutOfMemoryError"}
COMPILE = {"CompilationError", "PTXASError", "UnsupportedLanguageConstruct", "CompileTimeAssertionFailure"}
CONSTRAINT = {"InvalidConfig", "InvalidProblem", "UnknownName"}
FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
STICKY = (  # after these the CUDA context answers every call with the same error
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "illegal instruction",
    "invalid program counter",
    "launch timed out",
    "hardware stack error",
    "invalid address space",
    "uncorrectable",
)
STAGES: dict[str, Status] = {  # what an exception of no telling class means
    "problem": "constraint",
    "render": "render",
    "load": "render",
    "inputs": "runtime",
    "compile": "compile",
    "launch": "runtime",
    "accuracy": "runtime",
    "timing": "runtime",
}


def classify(error: BaseException, stage: str) -> Status:
    """The status of a trial that raised `error` in `stage`; classes are told by name, so no GPU library is imported."""
    names = {cls.__name__ for cause in _chain(error) for cls in type(cause).__mro__}
    if names & RESOURCE or any(_says(error, sign) for sign in ("out of memory", *FULL_DISK)):
        return "resource"
    if is_sticky(error):
        return "runtime"
    if names & CONSTRAINT and stage in ("problem", "render"):
        return "constraint"
    if names & COMPILE:
        return "compile"
    if stage == "compile" and (_says(error, "CUDA error") or _says(error, "Triton Error [CUDA]")):
        return "runtime"  # it compiled, since it was launched
    return STAGES.get(stage, "runtime")


def is_sticky(error: BaseException) -> bool:
    """True if the process must be replaced, because its CUDA context is lost."""
    return any(_says(error, sign) for sign in STICKY)


def _says(error: BaseException, words: str) -> bool:
    return any(words in str(cause) for cause in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
