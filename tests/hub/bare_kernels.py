"""Run as a script: calls kernel repositories where hf_kvcache cannot be found.

python bare_kernels.py plain|interpreter FOLDER OUT OP...: results and what is said of them -> OUT, by torch.save.
`plain` has no Triton either; in `interpreter` every call must run on Triton's.
"""

import inspect
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

from hiding import hide

MODE, FOLDER, OUT, *OPS = sys.argv[1:]
HIDDEN = ("hf_kvcache",) if MODE == "interpreter" else ("hf_kvcache", "triton")
hide(*HIDDEN)
if MODE == "interpreter":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from kernel_cases import CASES, WRONG  # noqa: E402
from kernels import get_loaded_kernels, get_local_kernel  # noqa: E402

torch.set_num_threads(1)


def use_triton(kernel):
    """Let Triton take what is on the CPU, and nothing else take it."""
    dispatcher = sys.modules.get(f"{kernel.__name__}.kernels")
    if dispatcher is None:
        return
    dispatcher.fast_backend = lambda device: "triton"
    for path in Path(kernel.__file__).parent.glob("*_reference.py"):
        op = path.stem.removeprefix("kernels_").removesuffix("_reference")
        module = import_module(f"{kernel.__name__}.{path.stem}")
        for name in (op, "place_rows"):
            if hasattr(module, name) and name not in ("quant_pack", "sparse_pack"):
                setattr(module, name, refused)


def refused(*args, **kwargs):
    raise AssertionError("the reference was called")


def run(op):
    kernel = get_local_kernel(Path(FOLDER, op))
    if MODE == "interpreter":
        use_triton(kernel)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = [x.clone() for x in CASES[op](kernel)]
    try:
        refusal = WRONG[op](kernel) if op in WRONG else None
    except ValueError as error:
        refusal = f"ValueError: {error}"
    found = {name: getattr(kernel, name) for name in kernel.__all__}
    functions = {name: x for name, x in found.items() if inspect.isfunction(x)}
    return {
        "results": results,
        "refusal": refusal,
        "said": [str(w.message) for w in said],
        "id": kernel.__name__,
        "all": sorted(found),
        "signatures": {name: str(inspect.signature(x)) for name, x in functions.items()},
        "docs": {name: x.__doc__ for name, x in found.items() if hasattr(x, "__name__")},
    }


if __name__ == "__main__":
    answers = {op: run(op) for op in OPS}
    assert not [name for name in sys.modules if name.partition(".")[0] in HIDDEN]
    assert len(get_loaded_kernels()) == len(OPS)
    torch.save(answers, OUT)
