"""Whether kernels that Inductor made may be launched before the kernel ahead of them has ended.

Programmatic dependent launch (compute capability 9.0 and above) sets a kernel up while its predecessor still runs;
the kernel must then wait for it before it touches what the predecessor wrote, and before it overwrites what the
predecessor reads. Inductor puts such a wait in front of loads that need it, and otherwise behind the last load. So a
kernel is right if it waits before it lets its successor start and before its first store: its predecessor, which
did the same, and with it all others before, have then ended. A kernel without any load would not wait at all.

Behind kernels of others that is not enough. Inductor takes a load to need a wait only where the *node* before wrote
what is loaded. A foreign operation may write it and be followed by nodes that launch nothing (a view, one of several
outputs), and a foreign kernel may let its successor start before it waits itself. The kernel behind then reads what is
not written yet: indices from a sort that is still running, in the routing of DeepSeek-V2's experts. So code that calls
operations of others, products of matrices apart, is never launched early.

Code that breaks one of these rules is found here, and compiled again without early launches.

Our own kernels do the same, with one exception: behind prompts, whose kernel was launched the ordinary way, the decode
kernel waits only before it stores its results (`attention/triton_decode.py` says why it may).
"""

from __future__ import annotations

import re
from pathlib import Path

# Each writes its result under its own name by its last kernel.
_OWN_OPERATIONS = "hf_async_batching"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_FOREIGN = re.compile(
    r"\btorch\.ops\.(\w+)\.\w+(?:\.\w+)?\(|\bextern_kernels\.(\w+)\(|@triton_heuristics\.user_autotune"
)

_WAIT, _LAUNCH, _STORE = "gdc_wait()", "gdc_launch_dependents()", "tl.store("
_judged: dict[str, bool] = {}


def generated_code_waits() -> bool:
    """Whether all that Inductor has generated in this process, and that launches early, waits as it must.

    False, too, where this release keeps its code elsewhere and nothing can be said.
    """
    try:
        from torch._inductor.codecache import PyCodeCache

        files = {str(module.__file__) for module in PyCodeCache.modules}
    except (ImportError, AttributeError):
        return False
    for file in files - _judged.keys():
        try:
            _judged[file] = waits(Path(file).read_text(encoding="utf-8"))
        except OSError:
            _judged[file] = False
    return all(_judged[file] for file in files)


def waits(code: str) -> bool:
    """Whether every kernel in a generated module that is launched early has what it reads before it reads it.

    Each waits before it stores and lets others start, and none runs beside operations of others.
    """
    early_ones = _WAIT in code or _LAUNCH in code or re.search(r"launch_pdl\W+True", code)
    if early_ones and foreign_operations(code):
        return False
    for kernel in re.split(r"^\s*@triton\.jit", code, flags=re.MULTILINE)[1:]:
        body = kernel.split("'''", 1)[0]
        wait, launch, store = (body.find(word) for word in (_WAIT, _LAUNCH, _STORE))
        early = launch >= 0 or wait >= 0
        if early and (wait < 0 or (0 <= launch < wait) or 0 <= store < wait):
            return False
    # What is launched early says so in front of its function, and must be among those above.
    for kernel in code.split("async_compile.triton(")[1:]:
        if re.search(r"launch_pdl\W+True", kernel) and _WAIT not in kernel.split("'''")[1]:
            return False
    return True


def foreign_operations(code: str) -> list[str]:
    """Operations in a generated module that are neither Inductor's nor ours, products of matrices apart."""
    found: list[str] = []
    for line in code.splitlines():
        if line.lstrip().startswith("#"):
            continue
        for match in _FOREIGN.finditer(line):
            namespace, product = match.groups()
            if namespace != _OWN_OPERATIONS and product not in _PRODUCTS:
                found.append(match[0].rstrip("("))
    return found
