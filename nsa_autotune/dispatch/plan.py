"""A prepared launch: what a generated `launch` did, done again with other tensors by calling Triton's C launcher.

Prepared once for a call's numbers, for the strides that its launch asks for, and for which tensors are aligned; a call
that is unlike gets one of its own. Whatever a recording does not understand is launched by Triton itself, and counted
by its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch

from . import triton_launch
from .plan_source import PlanSource
from .recording import Recording, record
from .triton_launch import CannotPrepareError

MOST_PLANS = 8  # layouts and numbers of one shape

Plan = Callable[[Mapping[str, Any]], bool]


def make_plan(recording: Recording, arguments: Mapping[str, Any], device: int, stream_of: Callable[[int], int]) -> Plan:
    """What launches again with the caller's tensors and returns True, or False if they are unlike the recorded ones.

    The sizes, dtypes and devices of the tensors are those of the recording: who calls sees to that.
    """
    source = PlanSource()
    source.check(arguments, recording.strided)
    source.launch(recording, device, stream_of)
    return source.compiled()


class PreparedLaunch:
    """Serves the calls of one shape: by a plan that fits, else by recording one, else by the ordinary launch.

    trusted: raises CannotPrepareError where prepared launches are not known to be right. ordinary: counts the launches
    that went Triton's own way, by reason. explained: what is raised for an error of a launch.
    """

    def __init__(
        self,
        launch: FunctionType,
        trusted: Callable[[], None],
        ordinary: Counter[str],
        explained: Callable[[Exception], Exception],
    ) -> None:
        self._launch, self._trusted, self._ordinary, self._explained = launch, trusted, ordinary, explained
        self._plans: list[Plan] = []
        compiled = triton_launch.kernels_among(launch.__globals__)
        self._refusal = "" if compiled else "kernels are interpreted"
        self._hooked = triton_launch.hook_check()

    def __call__(self, arguments: Mapping[str, Any]) -> None:
        """Launch with tensors of this shape."""
        try:
            if not self._hooked():
                for plan in self._plans:
                    if plan(arguments):
                        return
            with triton_launch.FIRST_LAUNCHES:
                self._without_plan(arguments)
        except torch.OutOfMemoryError:
            raise  # the caller's to mend: no other config would need less
        except Exception as error:
            raise self._explained(error) from error

    def _without_plan(self, arguments: Mapping[str, Any]) -> None:
        if not self._hooked() and any(plan(arguments) for plan in self._plans):
            return  # another thread made it meanwhile
        try:
            self._check(arguments)
        except CannotPrepareError as error:
            self._ordinary[str(error)] += 1
            self._launch(**arguments)
            return
        recording = record(self._launch, arguments)
        if recording.refusal:
            self._refusal = recording.refusal
            self._ordinary[recording.refusal] += 1
            return
        try:
            self._plans.append(make_plan(recording, arguments, *triton_launch.active_device()))
        except Exception as error:  # the launch itself is done and was right
            self._refusal = f"{type(error).__name__}: {error}"
            self._ordinary[self._refusal] += 1

    def _check(self, arguments: Mapping[str, Any]) -> None:
        """Raise CannotPrepareError if this call must not be recorded."""
        if self._refusal:
            raise CannotPrepareError(self._refusal)
        if self._hooked():
            raise CannotPrepareError("launch hooks are installed")
        if len(self._plans) >= MOST_PLANS:
            raise CannotPrepareError(f"a shape came in more than {MOST_PLANS} layouts")
        self._trusted()
