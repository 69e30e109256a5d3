"""Calls that give the same numbers whatever their caller has set in torch.

They run under torch's defaults. Then the caller's settings are back.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import overrides
from torch.utils._python_dispatch import _disable_current_modes

from core.errors import UserError

matmul: Any = torch.backends.cuda.matmul
onednn: Any = torch.backends.mkldnn


class Setting(NamedTuple):
    """A setting of the process, and its value during a call."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    value: Any


def _attribute(owner: Any, name: str, value: Any) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def _matmul_precision() -> str | None:
    """None where it differs between CUDA and oneDNN; torch then refuses to answer."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_matmul_precision(value: str | None) -> None:
    if value is not None:
        torch.set_float32_matmul_precision(value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


SETTINGS = (
    Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    Setting(_matmul_precision, _set_matmul_precision, "highest"),  # It changes the next two, so it is the first.
    _attribute(matmul, "fp32_precision", "ieee"),
    _attribute(onednn.matmul, "fp32_precision", "ieee"),
    Setting(_deterministic, lambda new: torch.use_deterministic_algorithms(new[0], warn_only=new[1]), (False, False)),
    Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False),
    _attribute(onednn, "enabled", True),
    _attribute(onednn, "deterministic", False),
    _attribute(matmul, "allow_bf16_reduced_precision_reduction", True),
)

_lock = threading.Lock()
_calls = 0  # the number of isolated calls now
_before: list[Any] = []  # the values of SETTINGS before the first of them


class SettingError(UserError):
    """The caller has changed torch in a way that cannot be undone here; the message says what to do."""


@contextlib.contextmanager
def isolated(precision: str = "float32") -> Iterator[None]:
    """Run a call under torch's defaults, and put the caller's settings back.

    Settings of the process come back when the last of several calls at once has ended. The default generator is left
    alone: no number of this project comes from it.

    Args:
        precision: Of matrix products, as in a spec: with "tf32", float32 products may run in TF32.
    """
    flushes = sys.float_info.min / 2 == 0.0  # whether this thread sets subnormal numbers to 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_default_settings())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # Modes intercept torch's functions and operators; the default device is one, too.
        for _ in overrides._get_current_function_mode_stack():
            stack.callback(overrides._push_mode, overrides._pop_mode())
        stack.enter_context(_disable_current_modes())
        if flushes:
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        yield


def is_traced() -> bool:
    """Whether torch.compile or torch.export traces this call."""
    return torch.compiler.is_compiling()


def check_threads() -> None:
    """Refuse threads of torch's pool that set subnormal numbers to 0. A thread that started while
    torch.set_flush_denormal was on does so for ever.

    Raises:
        SettingError: They do.
    """
    share = 1 << 15  # elements that torch gives to a thread, at least
    if (torch.full((torch.get_num_threads() * share,), 2e-38) * 0.1 == 0).any():
        raise SettingError(
            "the threads of torch set subnormal numbers to 0, which changes bits: start Python again, and call "
            "torch.set_flush_denormal after this"
        )


@contextlib.contextmanager
def _default_settings() -> Iterator[None]:
    global _calls, _before
    with _lock:
        if not _calls:
            _before = [setting.read() for setting in SETTINGS]
            _write([setting.value for setting in SETTINGS])
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                _write(_before)


def _write(values: list[Any]) -> None:
    for setting, value in zip(SETTINGS, values, strict=True):
        if setting.read() != value:  # Some take seconds to write for the first time: they import the compiler.
            setting.write(value)


def _forget_calls() -> None:
    """In a fork, other threads of the parent do not exist: neither their calls, nor who held the lock."""
    global _lock, _calls
    _lock, _calls = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_calls)
