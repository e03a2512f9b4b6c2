"""Says what failed on a device, and whether the process can still use it."""

from __future__ import annotations

import torch

from hf_async_batching.errors import DeviceFailedError

_Accelerator: type[Exception] = getattr(torch, "AcceleratorError", RuntimeError)
_SIGNS = ("CUDA error", "device-side assert", "illegal memory access", "[CUDA]", "CUDNN_STATUS", "CUBLAS_STATUS")


def is_device_failure(error: BaseException) -> bool:
    """Whether an error, or what it came from, is a device's own."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, DeviceFailedError) or (
            isinstance(cause, RuntimeError)
            and not isinstance(cause, torch.OutOfMemoryError)
            and (
                (_Accelerator is not RuntimeError and isinstance(cause, _Accelerator))
                or any(sign in str(cause) for sign in _SIGNS)
            )
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def device_failure(error: BaseException, name: str, route: str, step: str, device: torch.device) -> DeviceFailedError:
    """An error that says which model failed, how it was served, and in which step.

    Args:
        error: The device's own.
        name: Class of the model.
        route: How it was served: "packed", "padded", …; empty where that was not known yet.
        step: What was computed.
        device: Where.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    served = f", served as {route}," if route else ""
    text = f"{name}{served} failed on {device} in {step}: {type(error).__name__}: {reason}."
    if is_lost(device):
        text += (
            " The CUDA context of this process is gone with it: nothing in this process can use the GPU any more, "
            "other models and plain `generate` included. Start the process again and use plain `model.generate` for "
            "this model; and please report it with its config."
        )
    return DeviceFailedError(text)


def is_lost(device: torch.device) -> bool:
    """Whether a device has stopped responding, as after an assertion in a kernel."""
    return why_lost(device) is not None


def why_lost(device: torch.device) -> str | None:
    """What a lost device answers, in one line; None for a device that can be used."""
    if device.type != "cuda":
        return None
    try:
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    return None


def ends_the_search(error: BaseException, device: torch.device) -> bool:
    """Whether nothing else can be tried after an error: a device's own, after which it answers to nothing.

    Libraries report shapes that they do not know, and memory that they lack, as errors of the device, too.
    """
    return isinstance(error, DeviceFailedError) or (is_device_failure(error) and is_lost(device))
