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

SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024}  # bytes a thread block may ask for
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS_PER_SM, WARPS_PER_SM = 65536, 64
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass
class Spec:
    """One kernel variant.

    Attributes:
        name: readable id.
        kernel: the `triton.jit` function.
        types: type of every run-time argument, as Triton writes it ("*bf16", "i32", ...).
        constants: compile-time arguments, compiler options among them.
        elements: cached elements (K and V) that one iteration of the main loop consumes; 0 when there is none.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict
    elements: int = 0


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


def specs() -> list[Spec]:
    """Every kernel variant that the launchers can ask for, up to what changes nothing in the machine code."""
    makers = (_dense_specs, _quant_specs, _pack_specs, _sparse_specs, _gluon_specs, _sparse_pack_specs)
    makers += (_lowrank_specs, _ragged_specs, _merge_specs, _step_specs)
    return [spec for maker in makers for spec in maker()]


def _dense_specs():
    from hf_kvcache.kernels.dense_attention import triton_kernel as dense

    # channels of a key and of a value
    for D, DV, dtype, mask, cap in [
        (64, 64, "bf16", 0, False),
        (80, 80, "bf16", 0, False),
        (128, 128, "bf16", 0, False),
        (128, 128, "bf16", 2, True),
        (192, 128, "bf16", 0, False),
        (192, 128, "bf16", 2, True),
        (256, 256, "bf16", 0, False),
        (128, 128, "fp16", 1, False),
    ]:
        kernel = dense.dense_attention_fwd_kernel
        config = dense.dense_config(D, 2, DV)
        pointers = {**dict.fromkeys(("q", "k", "v"), dtype), "mask": "u8", "out": "fp32", "lse": "fp32"}
        constants = {**config, "UNIT": 8, "MASK": mask, "CAP": cap}
        name = f"dense-d{D}" + f"-v{DV}" * (DV != D) + f"-{dtype}" + "-mask" * bool(mask) + "-softcap" * cap
        yield _spec(name, kernel, pointers, constants, config["NB"] * config["NR"] * (D + DV))


def _quant_specs():
    from hf_kvcache.kernels.quant_attention import triton_kernel as quant

    for sizes, bits, axis, group, dtype, mask, cap in [
        ((192, 128), (8, 8), "channel", 64, "bf16", 0, False),
        ((192, 128), (4, 4), "channel", 64, "bf16", 2, True),
        ((192, 128), (2, 2), "channel", 32, "bf16", 0, False),
        ((192, 128), (4, 4), "token", 64, "bf16", 0, False),
        (64, (4, 4), "channel", 64, "bf16", 0, False),
        (64, (2, 2), "channel", 32, "bf16", 0, False),
        (80, (4, 4), "channel", 80, "bf16", 0, False),
        (128, (8, 8), "channel", 64, "bf16", 0, False),
        (128, (4, 4), "channel", 64, "bf16", 0, False),
        (128, (2, 2), "channel", 32, "bf16", 0, False),
        (128, (8, 4), "channel", 64, "bf16", 0, False),
        (128, (4, 4), "channel", 64, "bf16", 1, False),
        (128, (4, 4), "channel", 64, "fp16", 2, True),
        (128, (8, 8), "token", 64, "bf16", 0, False),
        (128, (4, 4), "token", 64, "bf16", 0, False),
        (128, (2, 2), "token", 32, "bf16", 0, False),
        (256, (8, 8), "channel", 128, "bf16", 0, False),
        (256, (8, 8), "token", 128, "bf16", 0, False),
        (256, (4, 4), "token", 64, "bf16", 0, False),
        (256, (4, 4), "channel", 64, "bf16", 0, False),
        (256, (2, 2), "channel", 32, "bf16", 0, False),
    ]:
        kernel = quant.quant_attention_fwd_kernel
        D, DV = sizes if isinstance(sizes, tuple) else (sizes, sizes)
        config = quant.quant_config(D, bits, axis, D // group, DV // group, DV)
        halves = dict.fromkeys(("k_scale", "k_zero", "v_scale", "v_zero"), "fp16")
        pointers = {"q": dtype, "k_codes": "i16", "v_codes": "i16", **halves}
        pointers |= {"mask": "u8", "out": "fp32", "lse": "fp32"}
        constants = {**config, "UNIT": 8, "MASK": mask, "CAP": cap, "EXACT": False, "ASM": True}
        name = f"quant-d{D}" + f"-v{DV}" * (DV != D) + f"-k{bits[0]}v{bits[1]}-{axis}-g{group}-{dtype}"
        name += ("-mask" if mask else "") + ("-softcap" if cap else "")
        # V_TILES programs share the elements of one tile
        yield _spec(name, kernel, pointers, constants, config["NB"] * config["NR"] * (D + DV) // config["V_TILES"])


def _pack_specs():
    from hf_kvcache.kernels.quant_pack import triton_kernel as pack

    for D, bits, axis, group, dtype in [
        (128, 8, "channel", 32, "bf16"),
        (128, 4, "channel", 32, "bf16"),
        (128, 2, "channel", 32, "fp16"),
        (128, 8, "token", 64, "bf16"),
        (128, 4, "token", 64, "bf16"),
        (256, 2, "token", 32, "fp32"),
    ]:
        pointers = {"x": dtype, "codes": "i16", "scale": "fp16", "zero": "fp16"}
        constants = pack.pack_config(D, bits, axis == "channel", group)
        yield _spec(f"pack-d{D}-{bits}bit-{axis}-{dtype}", pack.quant_pack_fwd_kernel, pointers, constants)


# forms of `sparse_attention.triton_kernel.side_format`: form, kept channels, bits, groups
def _bitmap(keep, bits=0, groups=0):
    return "bitmap", keep, bits, groups


def _sparse_specs():
    from hf_kvcache.kernels.sparse_attention import triton_kernel as sparse

    for sizes, keys, values, dtype, mask in [
        ((192, 128), _bitmap(64), _bitmap(40), "bf16", 0),
        ((192, 128), _bitmap(64, 4, 1), _bitmap(40, 4, 1), "bf16", 0),
        (64, _bitmap(40), _bitmap(40), "bf16", 0),
        (80, _bitmap(40), _bitmap(40), "bf16", 0),
        (128, _bitmap(40), _bitmap(40), "bf16", 0),
        (128, _bitmap(64), _bitmap(64), "bf16", 0),
        (128, _bitmap(64), _bitmap(40), "fp16", 2),
        (256, _bitmap(64), _bitmap(64), "bf16", 0),
        (64, _bitmap(40, 4, 1), _bitmap(40, 4, 1), "bf16", 0),
        (80, _bitmap(40, 4, 1), _bitmap(40, 4, 1), "bf16", 0),
        (128, _bitmap(40, 4, 1), _bitmap(40, 4, 1), "bf16", 0),
        (128, _bitmap(64, 8, 2), _bitmap(64, 2, 2), "fp16", 2),
        (128, _bitmap(64, 4, 1), ("all", 128, 0, 0), "bf16", 1),
        (256, _bitmap(64, 4, 1), _bitmap(64, 4, 1), "bf16", 0),
        (64, ("pairs", 32, 0, 0), ("pairs", 32, 0, 0), "bf16", 0),
        (80, ("pairs", 40, 0, 0), ("pairs", 40, 0, 0), "bf16", 0),
        (128, ("pairs", 64, 0, 0), ("pairs", 64, 0, 0), "bf16", 0),
        (128, ("pairs", 64, 0, 0), ("pairs", 64, 0, 0), "fp16", 2),
        (256, ("pairs", 128, 0, 0), ("pairs", 128, 0, 0), "bf16", 0),
    ]:
        D, DV = sizes if isinstance(sizes, tuple) else (sizes, sizes)
        config = sparse.sparse_config(D, keys, values, DV)
        pointers = {"q": dtype, **_side("k", keys, dtype), **_side("v", values, dtype)}
        for side, (_, _, bits, _) in (("k", keys), ("v", values)):
            pointers |= dict.fromkeys((f"{side}_scale", f"{side}_zero"), "fp16" if bits else dtype)
        name = f"sparse-d{D}" + f"-v{DV}" * (DV != D) + f"-{_side_name(keys, values)}-{dtype}"
        yield _sparse_spec(name, sparse.sparse_attention_fwd_kernel, pointers, config, mask)


def _gluon_specs():
    """The Gluon kernel, where this Triton has what it needs."""
    try:
        from triton.experimental.gluon import language

        from hf_kvcache.kernels.sparse_attention import gluon_kernel as gluon
    except (ImportError, AttributeError):
        return
    if not hasattr(language.shared_memory_descriptor, "scatter"):
        return
    for D, form, keep, dtype, mask in [
        (64, "bitmap", 40, "bf16", 0),
        (80, "bitmap", 40, "bf16", 0),
        (128, "bitmap", 40, "bf16", 0),
        (128, "bitmap", 64, "bf16", 0),
        (128, "bitmap", 64, "fp16", 2),
        (64, "pairs", 32, "bf16", 0),
        (80, "pairs", 40, "bf16", 2),
        (128, "pairs", 64, "bf16", 0),
        (128, "pairs", 64, "fp16", 2),
        (64, "index", 40, "bf16", 0),
        (80, "index", 40, "bf16", 0),
        (128, "index", 40, "bf16", 0),
        (128, "index", 64, "fp16", 2),
        (128, "index", 80, "bf16", 2),
        (256, "index", 40, "bf16", 2),
    ]:
        side = (form, keep, 0, 0)
        pointers = {"q": dtype, **_side("k", side, dtype), **_side("v", side, dtype)}
        name = f"gluon-d{D}-{_side_name(side, side)}-{dtype}"
        config = gluon.gluon_config(D, side, side)
        yield _sparse_spec(name, gluon.sparse_attention_gluon_kernel, pointers, config, mask)


def _side(letter, side, dtype):
    form, _, bits, _ = side
    return {f"{letter}_values": "i16" if bits else dtype, f"{letter}_places": dtype if form == "all" else "u8"}


def _side_name(*sides):
    names = [form + str(keep) + f"-{bits}bit" * bool(bits) for form, keep, bits, _ in sides]
    return "-".join(dict.fromkeys(names))


def _sparse_spec(name, kernel, pointers, config, mask):
    pointers |= {"mask": "u8", "out": "fp32", "lse": "fp32"}
    name += "-mask" * bool(mask) + "-softcap" * (mask == 2)
    constants = {**config, "UNIT": 8, "MASK": mask, "CAP": mask == 2}
    elements = config["NB"] * config["NR"] * (config["D"] + config.get("DV", config["D"]))
    return _spec(name, kernel, pointers, constants, elements)


def _sparse_pack_specs():
    import torch

    from hf_kvcache.kernels.sparse_pack import triton_kernel as pack

    for D, keep, layout, group_size, dtype in [
        (64, 40, "bitmap", None, torch.bfloat16),
        (80, 40, "bitmap", None, torch.bfloat16),
        (128, 40, "bitmap", None, torch.bfloat16),
        (128, 64, "bitmap", 4, torch.bfloat16),
        (128, 40, "index", None, torch.float16),
        (256, 64, "bitmap", None, torch.float32),
    ]:
        integer = "i32" if dtype == torch.float32 else "i16"
        pointers = {**dict.fromkeys(("x", "worth", "values"), integer), "places": "u8"}
        constants = pack.pack_config(D, keep, layout, group_size, dtype)
        name = f"sparse-pack-d{D}-{layout}{keep}" + f"-groups-of-{group_size}" * bool(group_size)
        yield _spec(f"{name}-{str(dtype).removeprefix('torch.')}", pack.sparse_pack_fwd_kernel, pointers, constants)


def _lowrank_specs():
    from hf_kvcache.kernels.lowrank_attention import triton_kernel as lowrank

    # key and value rank and bits (None: weights to memory), query rows of a KV head, rotary channels (None: absorbed)
    for D, keys, values, rows, rotary, dtype, mask in [
        (128, (64, 0), None, 4, 128, "bf16", 0),
        (128, (64, 0), None, 1, 128, "fp16", 0),
        (128, (64, 0), None, 6, 128, "bf16", 2),
        (128, (64, 0), None, 20, 128, "bf16", 2),
        (128, (64, 4), None, 4, 128, "bf16", 0),
        (128, (64, 4), None, 12, 128, "fp16", 2),
        (128, (48, 3), None, 4, 128, "bf16", 0),
        (128, (64, 2), None, 1, 128, "bf16", 0),
        (128, (96, 0), None, 4, 128, "bf16", 0),
        (128, (128, 0), None, 4, 128, "bf16", 0),
        (128, (128, 8), None, 4, 128, "bf16", 0),
        (128, (256, 0), None, 4, 128, "bf16", 0),
        (128, (80, 0), None, 7, 128, "bf16", 0),
        (64, (32, 0), None, 4, 64, "bf16", 0),
        (64, (32, 4), None, 7, 64, "bf16", 0),
        (80, (48, 0), None, 1, 32, "bf16", 1),
        (96, (48, 0), None, 1, 96, "bf16", 0),
        (256, (128, 0), None, 4, 256, "bf16", 0),
        (256, (240, 4), None, 4, 256, "bf16", 0),
        (256, (64, 0), None, 4, 64, "bf16", 0),
        (128, (64, 0), (64, 0), 4, 0, "bf16", 0),
        (128, (64, 0), (64, 0), 4, None, "bf16", 0),
        (128, (128, 0), (128, 0), 8, None, "bf16", 0),
        (128, (64, 4), (64, 4), 4, None, "bf16", 0),
        (128, (64, 4), (64, 4), 20, None, "bf16", 2),
        (128, (64, 4), None, 4, None, "bf16", 0),
        (128, (256, 0), None, 32, None, "bf16", 0),
        (64, (32, 4), (32, 4), 1, None, "fp16", 0),
    ]:
        k, v = (None if side is None else lowrank.format_of(*side, groups=1) for side in (keys, values))
        config = lowrank.key_config(D if rotary is not None else keys[0], rows, k, v, rotary, mean=rotary is not None)
        pointers = {"q": dtype, "up": dtype, "mean": "fp32", "positions": "i32", "coarse": "fp32", "fine": "fp32"}
        pointers |= _latent_types("k", keys, dtype) | _latent_types("v", values or keys, dtype)
        pointers |= {"mask": "u8", "out": "fp32" if values else dtype, "lse": "fp32"}
        constants = {**config, "UNIT": 8, "MASK": mask, "CAP": mask == 2}
        name = "absorbed" if rotary is None else f"d{D}" + f"-rotary{rotary}" * (rotary != D)
        name = f"lowrank-{name}-k{_latent_name(keys)}-" + (f"v{_latent_name(values)}" if values else "weights")
        name += f"-m{rows}-{dtype}" + "-mask" * bool(mask) + "-softcap" * (mask == 2)
        elements = lowrank.TILE * (keys[0] + (values[0] if values else 0))
        yield _spec(name, lowrank.lowrank_attention_fwd_kernel, pointers, constants, elements)
    for values, rows, dtype in [
        ((512, 0), 32, "bf16"),
        ((64, 0), 4, "bf16"),
        ((64, 4), 4, "bf16"),
        ((512, 4), 32, "bf16"),
        ((128, 2), 8, "fp16"),
        ((256, 8), 64, "bf16"),
        ((96, 3), 16, "bf16"),
        ((48, 0), 160, "bf16"),
    ]:
        config = lowrank.value_config(rows, lowrank.format_of(*values, groups=1))
        pointers = {"weights": dtype, "tops": "fp32", **_latent_types("v", values, dtype), "out": "fp32", "lse": "fp32"}
        name = f"lowrank-values{_latent_name(values)}-m{rows}-{dtype}"
        elements = config["NR"] * config["VWP"] * config["VF"]
        yield _spec(name, lowrank.weighted_latents_fwd_kernel, pointers, {**config, "UNIT": 8}, elements)


def _latent_types(letter, side, dtype):
    scale = "fp16" if side[1] else dtype
    return {f"{letter}_rows": "i16" if side[1] else dtype, f"{letter}_scale": scale, f"{letter}_zero": scale}


def _latent_name(side):
    return f"{side[0]}" + f"x{side[1]}bit" * bool(side[1])


def _ragged_specs():
    from hf_kvcache.kernels.ragged_attention import triton_kernel as ragged

    def dense(D):
        return "plain", D, 0, 0

    def codes(D, bits, groups):
        return "plain", D, bits, groups

    pairs = "pairs", 64, 0, 0
    # head size, form of keys and of values, rows of a page
    for sizes, keys, values, page, dtype, cap in [
        ((192, 128), dense(192), dense(128), 16, "bf16", False),
        ((192, 128), codes(192, 4, 3), codes(128, 4, 2), 32, "bf16", False),
        ((192, 128), codes(192, 8, 3), codes(128, 8, 2), 32, "bf16", False),
        ((192, 128), _bitmap(64), _bitmap(40), 32, "bf16", False),
        (64, dense(64), dense(64), 16, "bf16", False),
        (80, dense(80), dense(80), 32, "bf16", False),
        (128, dense(128), dense(128), 16, "bf16", False),
        (128, dense(128), dense(128), 32, "fp16", True),
        (128, dense(128), dense(128), 64, "bf16", False),
        (256, dense(256), dense(256), 16, "bf16", False),
        (256, dense(256), dense(256), 64, "bf16", True),
        (64, codes(64, 4, 1), codes(64, 4, 1), 32, "bf16", False),
        (80, codes(80, 4, 1), codes(80, 4, 1), 32, "bf16", False),
        (128, codes(128, 8, 2), codes(128, 8, 2), 32, "bf16", False),
        (128, codes(128, 4, 2), codes(128, 4, 2), 16, "bf16", False),
        (128, codes(128, 4, 2), codes(128, 4, 2), 32, "fp16", True),
        (128, codes(128, 4, 1), codes(128, 4, 1), 64, "bf16", False),
        (128, codes(128, 2, 4), codes(128, 2, 4), 32, "bf16", False),
        (128, codes(128, 8, 2), codes(128, 4, 2), 32, "bf16", False),
        (128, codes(128, 4, 2), dense(128), 32, "bf16", False),
        (128, dense(128), codes(128, 4, 2), 32, "bf16", False),
        (256, codes(256, 8, 2), codes(256, 8, 2), 32, "bf16", False),
        (256, codes(256, 4, 4), codes(256, 4, 4), 16, "bf16", False),
        (256, codes(256, 2, 8), codes(256, 2, 8), 32, "bf16", False),
        (256, codes(256, 4, 2), dense(256), 32, "bf16", False),
        (256, dense(256), codes(256, 4, 2), 32, "bf16", False),
        (64, _bitmap(40), _bitmap(40), 32, "bf16", False),
        (80, _bitmap(40), _bitmap(40), 16, "bf16", False),
        (128, _bitmap(40), _bitmap(40), 16, "bf16", False),
        (128, _bitmap(64), _bitmap(40), 32, "fp16", True),
        (128, _bitmap(40), dense(128), 32, "bf16", False),
        (128, _bitmap(40), codes(128, 4, 2), 32, "bf16", False),
        (128, _bitmap(40, 4, 1), _bitmap(40, 4, 1), 32, "bf16", False),
        (128, pairs, pairs, 32, "bf16", False),
        (256, _bitmap(64), _bitmap(64), 32, "bf16", False),
        (256, _bitmap(64), dense(256), 32, "bf16", False),
        (256, _bitmap(64, 4, 1), codes(256, 4, 2), 32, "bf16", False),
    ]:
        D, DV = sizes if isinstance(sizes, tuple) else (sizes, sizes)
        config = ragged.ragged_config(D, keys, values, page, 2, DV)
        pointers = {"q": dtype, "table": "i32", "lengths": "i32", "out": "fp32", "lse": "fp32"}
        for side, (form, _, bits, _) in (("k", keys), ("v", values)):
            pointers[f"{side}_rows"] = "i16" if bits else dtype
            pointers[f"{side}_places"] = pointers[f"{side}_rows"] if form == "plain" else "u8"
            pointers |= dict.fromkeys((f"{side}_scale", f"{side}_zero"), "fp16" if bits else dtype)
        constants = {**config, "CAP": cap, "EXACT": False, "ASM": True}
        names = dict.fromkeys(_ragged_name(*side) for side in (keys, values))
        name = f"ragged-d{D}" + f"-v{DV}" * (DV != D) + f"-{'-'.join(names)}-page{page}-{dtype}" + "-softcap" * cap
        elements = config["NB"] * config["NR"] * (D + DV) // config["V_TILES"]
        yield _spec(name, ragged.ragged_attention_fwd_kernel, pointers, constants, elements)


def _ragged_name(form, keep, bits, groups):
    if form == "plain":
        return f"{bits}bit-g{keep // groups}" if bits else "dense"
    return _side_name((form, keep, bits, groups))


def _merge_specs():
    from hf_kvcache.kernels.merge_states import triton_kernel as merge

    for D, dtype in ((64, "bf16"), (128, "bf16"), (256, "fp16"), (512, "fp32")):
        pointers = {"partial_out": "fp32", "partial_lse": "fp32", "out": dtype, "lse": "fp32"}
        constants = {"D": D, "DP": D, "BP": 16, "num_warps": 4, "enable_fp_fusion": True}
        yield _spec(f"merge-d{D}-{dtype}", merge.merge_states_fwd_kernel, pointers, constants)
    for D, dtype, ordered in ((64, "bf16", True), (128, "bf16", False), (256, "fp16", False)):
        pointers = {"partial_out": "fp32", "partial_lse": "fp32", "order": "i32", "lengths": "i32"}
        constants = {"D": D, "DP": D, "BP": 16, "ORDERED": ordered, "num_warps": 4, "enable_fp_fusion": True}
        name = f"merge-ragged-d{D}-{dtype}" + "-ordered" * ordered
        yield _spec(name, merge.merge_ragged_states_fwd_kernel, pointers | {"out": dtype, "lse": "fp32"}, constants)


def _step_specs():
    from hf_kvcache.kernels.merge_step import triton_kernel as merge
    from hf_kvcache.kernels.slot_step import triton_kernel as slots

    for D, dtype, segment in ((64, "bf16", "bf16"), (80, "fp16", "fp32"), (128, "bf16", "bf16"), (256, "fp32", "fp32")):
        pointers = {"x": dtype, "weights": "fp32", "segment": segment, "out": dtype}
        name = f"step-merge-d{D}-{dtype}" + f"-segment-{segment}" * (segment != dtype)
        yield _spec(name, merge.merge_step_fwd_kernel, pointers, merge.merge_config(D))
    decisions = {"alpha": "u8", "mask": "u8", "pending": "i32", "lengths": "i32"}
    for padded in (False, True):
        constants = {"PADDED": padded, **slots.CONFIG}
        name = "step-slot" + "-padded" * padded
        yield _spec(name, slots.slot_step_fwd_kernel, decisions | {"slot": "i32"}, constants)
    for sizes, dtype, padded in (((64, 64), "bf16", True), ((128, 128), "bf16", False), ((256, 80), "fp32", False)):
        pointers = decisions | dict.fromkeys(("k", "v", "k_pages", "v_pages"), dtype) | {"table": "i32"}
        constants = {"PADDED": padded, **slots.place_config(32, *sizes)}
        name = f"step-place-d{sizes[0]}-{dtype}" + "-padded" * padded
        yield _spec(name, slots.place_rows_fwd_kernel, pointers, constants)


def _spec(name, kernel, pointers, constants, elements=0):
    """Type the remaining arguments: factors are fp32, counts and strides i32."""
    types = {key: f"*{kind}" for key, kind in pointers.items()}
    for key in kernel.arg_names:
        if key not in types and key not in constants:
            types[key] = "fp32" if key in ("scaling", "softcap") else "i32"
    return Spec(name, kernel, types, constants, elements)


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
