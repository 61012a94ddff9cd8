"""Compile every Triton kernel ahead of time, on any machine, and read from the machine code what it will cost.

    python -m hf_kvcache.kernels.aot [--cc 90 80] [--only dense quant-d128] [--json]

The Triton wheel carries the assembler and the disassembler, so neither a GPU nor a CUDA toolkit is needed. A kernel
fails when it does not compile, spills registers, or wants more shared memory than a thread block may have. Races,
bank conflicts and time are out of sight. Exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_kvcache.kernels import compilers
from hf_kvcache.kernels.variants import Spec, specs

SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024}  # bytes a thread block may ask for
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS_PER_SM, WARPS_PER_SM = 65536, 64
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass
class Report:
    """What the machine code of one variant shows."""

    name: str
    cc: int
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    blocks_per_sm: int = 0
    loop: int = 0
    lane_instructions: float = 0.0
    tensor_core: int = 0
    faults: list[str] = field(default_factory=list)


def compile_spec(spec: Spec, cc: int) -> Report:
    """Compile one variant for compute capability `cc` and inspect it."""
    import triton
    from triton.backends.compiler import GPUTarget

    report = Report(spec.name, cc)
    names = spec.kernel.arg_names
    options = {key: spec.constants[key] for key in OPTIONS if key in spec.constants}
    source = _source_type(spec.kernel)(
        fn=spec.kernel,
        signature={name: spec.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(key),): value for key, value in spec.constants.items() if key in names},
        # allocations of torch are aligned, and the launcher says so to the compiler in the same way
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in spec.types.items() if kind[0] == "*"},
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        report.faults.append(f"{type(error).__name__}: {str(error)[:300]}")
        return report
    report.shared = compiled.metadata.shared
    _read_machine_code(report, compiled.asm["cubin"], options["num_warps"], spec.elements)
    if report.spills or report.stack:
        report.faults.append(f"{report.spills} spill instructions, {report.stack} bytes of stack")
    if report.shared > SHARED_PER_BLOCK[cc]:
        report.faults.append(f"{report.shared} bytes of shared memory")
    return report


def _source_type(kernel):
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _read_machine_code(report, cubin, num_warps, elements):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    report.registers, report.stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    instruction = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+ )?\s*([A-Z][A-Z0-9_]*)(\S*)(.*);", re.M)
    listing = [(int(at, 16), name, rest) for at, name, _, rest in instruction.findall(code)]
    counts = Counter(name for _, name, _ in listing)
    report.spills = counts["STL"] + counts["LDL"]
    report.tensor_core = counts["HMMA"] + counts["HGMMA"]
    # the main loop is the longest stretch that a branch jumps back over
    for at, name, rest in listing:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target.group(1), 16) < at:
            report.loop = max(report.loop, sum(int(target.group(1), 16) <= x <= at for x, _, _ in listing))
    if elements:
        report.lane_instructions = round(report.loop * 32 * num_warps / elements, 2)
    per_warp = -(-report.registers * 32 // 256) * 256
    by_shared = SHARED_PER_SM[report.cc] // (report.shared + 1024)
    report.blocks_per_sm = min(REGISTERS_PER_SM // (per_warp * num_warps), by_shared, WARPS_PER_SM // num_warps)


def _cuobjdump(flag, path):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = compilers.run([tool, flag, path])
    done.check_returncode()
    return done.stdout


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU.")
    parser.add_argument("--cc", type=int, nargs="+", default=[90, 80], help="compute capabilities")
    parser.add_argument("--only", nargs="+", default=[""], help="only variants whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="one JSON line per variant")
    args = parser.parse_args(argv)
    if os.environ.pop("TRITON_INTERPRET", None):
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    failed = False
    if not args.json:
        print(f"{'variant':44} sm regs spills shared blocks/SM HMMA loop lane-instr/element")
    for spec in specs():
        for cc in args.cc if any(part in spec.name for part in args.only) else ():
            report = compile_spec(spec, cc)
            failed |= bool(report.faults)
            if args.json:
                print(json.dumps(asdict(report)), flush=True)
                continue
            verdict = "; ".join(report.faults) or "ok"
            print(
                f"{spec.name:44} {cc} {report.registers:4} {report.spills:6} {report.shared:6} {report.blocks_per_sm:9}"
                f" {report.tensor_core:4} {report.loop:4} {report.lane_instructions:6}  {verdict}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
