"""Whether prepared launches are right on a device: tried once, on a tiny kernel, before the first one is prepared."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch

from . import triton_launch
from .plan import make_plan
from .recording import record
from .triton_launch import CannotPrepareError

logger = logging.getLogger(__name__.partition(".")[0])

ORDINARY_VARIABLE = "NSA_AUTOTUNE_ORDINARY_LAUNCHES"


def require_prepared_launches() -> None:
    """Raise CannotPrepareError unless prepared launches are right on the current CUDA device."""
    if os.environ.get(ORDINARY_VARIABLE):
        raise CannotPrepareError(f"{ORDINARY_VARIABLE} is set")
    if not torch.cuda.is_available():
        raise CannotPrepareError("there is no CUDA device")
    if torch.cuda.is_current_stream_capturing():  # the test waits for the device, which a capture forbids
        raise CannotPrepareError("a CUDA graph is being captured")
    reason = failure(torch.cuda.current_device())
    if reason:
        raise CannotPrepareError(reason)


@cache
def failure(device: int) -> str:
    """Why prepared launches are not used on a device, logged; "" if they are right."""
    try:
        triton_launch.check_version()
        _compare(torch.device("cuda", device))
    except CannotPrepareError as error:
        reason = str(error)
    except Exception as error:  # whatever goes wrong here would go wrong in every launch
        reason = f"the self-test failed: {type(error).__name__}: {error}"
    else:
        return ""
    logger.warning("kernels are launched by Triton itself, which takes about 10 us more each: %s", reason)
    return reason


def _compare(device: torch.device) -> None:
    """Raise CannotPrepareError unless a plan gives other tensors what Triton's own launch gives them."""
    from . import probe

    size = probe.ROWS * probe.COLUMNS
    use_maps = torch.cuda.get_device_capability(device)[0] >= 9
    first, second = (torch.arange(n, n + size, dtype=torch.float32, device=device) for n in (0, 7))
    arguments: dict[str, Any] = {"x": first, "out": torch.zeros_like(first), "scale": 3.0, "use_maps": use_maps}
    recording = record(probe.launch, arguments)
    if recording.refusal:
        raise CannotPrepareError(recording.refusal)
    plan = make_plan(recording, arguments, *triton_launch.active_device())
    again = {**arguments, "x": second, "out": torch.zeros_like(second)}
    if not plan(again) or not torch.equal(again["out"], second * 3.0 + 1.0):
        raise CannotPrepareError("a prepared launch gave another result than Triton's own")
    if plan({**again, "x": second[1:]}):
        raise CannotPrepareError("a prepared launch took a tensor that it was not prepared for")
