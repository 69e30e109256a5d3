"""Calls that give the same numbers whatever their caller has set in torch.

The settings below are torch's defaults. They hold for the length of a call; then the caller's are back.
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
    """A setting of the whole process: how to read it, how to write it, and what it is during a call."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    value: Any


def _attribute(owner: Any, name: str, value: Any) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def _matmul_precision() -> tuple[str | None, str, str]:
    """What float32 products may be computed in: in all, on CUDA and in oneDNN. There is no value for all where the two
    others differ."""
    whole = None
    with contextlib.suppress(RuntimeError):
        whole = torch.get_float32_matmul_precision()
    return whole, matmul.fp32_precision, onednn.matmul.fp32_precision


def _set_matmul_precision(values: tuple[str | None, str, str]) -> None:
    whole, matmul.fp32_precision, onednn.matmul.fp32_precision = values
    if whole is not None:
        torch.set_float32_matmul_precision(whole)
        _, matmul.fp32_precision, onednn.matmul.fp32_precision = values


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _detect_anomalies(new: bool) -> None:
    torch.autograd.set_detect_anomaly(new)


SETTINGS = (
    Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    Setting(_matmul_precision, _set_matmul_precision, ("highest", "ieee", "ieee")),
    Setting(_deterministic, lambda new: torch.use_deterministic_algorithms(new[0], warn_only=new[1]), (False, False)),
    Setting(torch.is_anomaly_enabled, _detect_anomalies, False),
    _attribute(onednn, "enabled", True),
    _attribute(onednn, "deterministic", False),
    _attribute(matmul, "allow_bf16_reduced_precision_reduction", True),
)

_lock = threading.Lock()
_calls = 0  # that are isolated now
_before: list[Any] = []  # the values of SETTINGS before the first of them


class SettingError(UserError):
    """The caller has changed torch in a way that cannot be undone here; the message says what to do."""


@contextlib.contextmanager
def isolated(precision: str = "float32") -> Iterator[None]:
    """Run a call under torch's defaults, whatever its caller has set, and put the caller's settings back.

    Those of the whole process are put back when the last of several calls at once has ended. The default generator is
    left alone: no number of this project comes from it.

    Args:
        precision: of the matrix products, as in a spec: with "tf32", float32 products may run in TF32.
    """
    flushes = sys.float_info.min / 2 == 0.0  # of this thread: whether numbers too small for an exponent become 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process_wide())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_without_modes())
        if flushes:
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        yield


def is_traced() -> bool:
    """Whether torch.compile or torch.export follows this call, rather than making it."""
    return torch.compiler.is_compiling()


def check_threads() -> None:
    """Refuse threads of torch's pool that set subnormal numbers to 0: they do so for ever if torch.set_flush_denormal
    was on when they started.

    Raises:
        SettingError: they do.
    """
    share = 1 << 15  # elements that torch gives to a thread, at least
    if (torch.full((torch.get_num_threads() * share,), 2e-38) * 0.1 == 0).any():
        raise SettingError(
            "the threads of torch set subnormal numbers to 0, which changes bits: start Python again, and call "
            "torch.set_flush_denormal after this"
        )


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    """Take away what intercepts torch's functions and operators; the default device is such a mode, too."""
    modes = [overrides._pop_mode() for _ in overrides._get_current_function_mode_stack()]
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(modes):
            overrides._push_mode(mode)


@contextlib.contextmanager
def _process_wide() -> Iterator[None]:
    global _calls, _before
    with _lock:
        if not _calls:
            _before = [setting.read() for setting in SETTINGS]
            for setting in SETTINGS:
                _write(setting, setting.value)
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                for setting, value in zip(SETTINGS, _before, strict=True):
                    _write(setting, value)


def _forget_calls() -> None:
    """In a fork: another thread of the parent may have held the lock, and its calls are not here."""
    global _lock, _calls
    _lock, _calls = threading.Lock(), 0


def _write(setting: Setting, value: Any) -> None:
    if setting.read() != value:  # some take seconds to write for the first time: they import the compiler
        setting.write(value)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_calls)
