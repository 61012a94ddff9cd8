"""Every variant of the Triton kernels that the launchers can ask for, as `aot` compiles them."""

from __future__ import annotations

from dataclasses import dataclass


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
        config = dense.dense_config(D, 2, DV)
        pointers = {**dict.fromkeys(("q", "k", "v"), dtype), "mask": "u8", "out": "fp32", "lse": "fp32"}
        constants = {**config, "UNIT": 8, "MASK": mask, "CAP": cap}
        name = f"dense-d{D}" + f"-v{DV}" * (DV != D) + f"-{dtype}" + "-mask" * bool(mask) + "-softcap" * cap
        elements = config["NB"] * config["NR"] * (D + DV)
        yield _spec(name, dense.dense_attention_fwd_kernel, pointers, constants, elements)


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
        D, DV = sizes if isinstance(sizes, tuple) else (sizes, sizes)
        config = quant.quant_config(D, bits, axis, D // group, DV // group, DV)
        halves = dict.fromkeys(("k_scale", "k_zero", "v_scale", "v_zero"), "fp16")
        pointers = {"q": dtype, "k_codes": "i16", "v_codes": "i16", **halves}
        pointers |= {"mask": "u8", "out": "fp32", "lse": "fp32"}
        constants = {**config, "UNIT": 8, "MASK": mask, "CAP": cap, "EXACT": False, "ASM": True}
        name = f"quant-d{D}" + f"-v{DV}" * (DV != D) + f"-k{bits[0]}v{bits[1]}-{axis}-g{group}-{dtype}"
        name += ("-mask" if mask else "") + ("-softcap" if cap else "")
        # V_TILES programs share the elements of one tile
        elements = config["NB"] * config["NR"] * (D + DV) // config["V_TILES"]
        yield _spec(name, quant.quant_attention_fwd_kernel, pointers, constants, elements)


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
    return "-".join(dict.fromkeys(form + str(keep) + f"-{bits}bit" * bool(bits) for form, keep, bits, _ in sides))


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
        (128, ("pairs", 64, 0, 0), ("pairs", 64, 0, 0), 32, "bf16", False),
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
        form = "-".join(dict.fromkeys(_ragged_name(*side) for side in (keys, values)))
        name = f"ragged-d{D}" + f"-v{DV}" * (DV != D) + f"-{form}-page{page}-{dtype}" + "-softcap" * cap
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
        pointers = decisions | {"slot": "i32"}
        yield _spec("step-slot" + "-padded" * padded, slots.slot_step_fwd_kernel, pointers, constants)
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
