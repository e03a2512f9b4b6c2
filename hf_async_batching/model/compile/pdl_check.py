"""Check that kernels which Inductor generated can use programmatic dependent launch (PDL) safely.

PDL (compute capability 9.0 and above) starts a kernel while its predecessor still runs. The kernel must wait for its
predecessor before it touches what the predecessor wrote, and before it overwrites what the predecessor reads. Inductor
puts such a wait in front of loads that need it, and otherwise after the last load. So a kernel is safe if it waits
before it lets its successor start and before its first store: its predecessor did the same, so all earlier kernels
have ended by then. A kernel without any load would not wait at all.

After foreign kernels this is not enough. Inductor adds a wait to a load only if the *node* before it wrote what is
loaded. But a foreign operation may write it and be followed by nodes that launch nothing (a view, one of several
outputs), and a foreign kernel may let its successor start before it waits itself. The next kernel then reads what is
not written yet: in the routing of DeepSeek-V2's experts, indices from a sort that is still running. So code that calls
foreign operations, other than matrix products, never uses PDL.

This module finds code that breaks one of these rules, and the caller compiles it again without PDL.

Our own kernels follow the same rules, with one exception: after the prefill kernel, which is launched without PDL, the
decode kernel waits only before it stores its results (`attention/triton_decode.py` says why this is safe).
"""

from __future__ import annotations

import re
from pathlib import Path

# The last kernel of each of our operations writes the result under the operation's own name.
_OWN_OPERATIONS = "hf_async_batching"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_FOREIGN = re.compile(
    r"\btorch\.ops\.(\w+)\.\w+(?:\.\w+)?\(|\bextern_kernels\.(\w+)\(|@triton_heuristics\.user_autotune"
)

_WAIT, _LAUNCH, _STORE = "gdc_wait()", "gdc_launch_dependents()", "tl.store("
_judged: dict[str, bool] = {}


def generated_code_waits() -> bool:
    """Whether all code that Inductor has generated in this process, and that uses PDL, waits as it must.

    False, too, if this release of torch keeps its code elsewhere, so that the check finds none.
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
    """Whether every kernel of a generated module that uses PDL waits for its input before it reads it.

    Each such kernel must wait before it stores and before it lets its successor start, and the module must call no
    foreign operation other than matrix products.
    """
    module_uses_pdl = _WAIT in code or _LAUNCH in code or re.search(r"launch_pdl\W+True", code)
    if module_uses_pdl and foreign_operations(code):
        return False
    for kernel in re.split(r"^\s*@triton\.jit", code, flags=re.MULTILINE)[1:]:
        body = kernel.split("'''", 1)[0]
        wait, launch, store = (body.find(word) for word in (_WAIT, _LAUNCH, _STORE))
        uses_pdl = launch >= 0 or wait >= 0
        if uses_pdl and (wait < 0 or (0 <= launch < wait) or 0 <= store < wait):
            return False
    # Each kernel that uses PDL is marked in front of its function, and must be among the kernels checked above.
    for kernel in code.split("async_compile.triton(")[1:]:
        if re.search(r"launch_pdl\W+True", kernel) and _WAIT not in kernel.split("'''")[1]:
            return False
    return True


def foreign_operations(code: str) -> list[str]:
    """Operations in a generated module that are neither Inductor's nor ours, except matrix products."""
    found: list[str] = []
    for line in code.splitlines():
        if line.lstrip().startswith("#"):
            continue
        for match in _FOREIGN.finditer(line):
            namespace, product = match.groups()
            if namespace != _OWN_OPERATIONS and product not in _PRODUCTS:
                found.append(match[0].rstrip("("))
    return found
