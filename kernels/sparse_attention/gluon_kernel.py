"""The kernel of `triton_kernel` in Gluon, which lets a row be expanded straight into tensor-core operands.

Bitmap rows pass through shared memory and every lane gathers the channels of its operand; rows of channel numbers are
scattered into zeroed shared memory and read back. Needs Triton 3.7, whose shared memory has gather and scatter.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from hf_kvcache.kernels import split_kv
from hf_kvcache.kernels.sparse_attention import reference
from hf_kvcache.kernels.sparse_attention import triton_kernel as sparse
from hf_kvcache.kernels.sparse_pack.reference import sparse_pack
from hf_kvcache.warn import warn_once

LOG2E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))

COUNT = gl.constexpr("popc.b32 $0, $1;")
_verdicts: dict[tuple, str | None] = {}  # by device, dtype and format

capped = gluon.jit(split_kv.capped.fn)
visible_rows = gluon.jit(split_kv.visible_rows.fn)


def obstacle(q, keys, values) -> str | None:
    """Why this kernel cannot take a call, or None."""
    D = q.shape[3]
    if not hasattr(gl.shared_memory_descriptor, "scatter"):
        return f"Triton {triton.__version__} has no scatter in shared memory (3.7 has)"
    if q.element_size() != 2:
        return f"{q.dtype} rows have no Gluon kernel"
    if values.row_width(D) != D:
        return f"keys of {D} and values of {values.row_width(D)} channels have no Gluon kernel"
    if D < 64 or D % 16:
        return f"head size {D} is not a multiple of 16 from 64 up"
    for side in (keys, values):
        if side.bits is not None:
            return "codes have no Gluon kernel"
        if side.places is None:
            return "rows with all channels have no Gluon kernel"
        # the limits are where the compiler begins to spill (hf_kvcache.kernels.aot)
        if side.layout == "bitmap" and D > 128:
            return f"bitmaps of {D} channels do not fit the registers"
        if side.layout == "index" and side.keep > (40 if D > 128 else 80):
            return f"{side.keep} numbered channels of {D} do not fit the registers"
    return disagreement(q, keys, values)


def disagreement(q, keys, values) -> str | None:
    """Run a small problem of this format, once per process, and say how it differs from the reference, or None.

    Gluon is experimental and has no interpreter: what a new version does to the kernel shows here first.
    """
    formats = sparse.side_format(keys, q.shape[3]), sparse.side_format(values, q.shape[3])
    key = (q.device, q.dtype, q.shape[3], *formats)
    if key not in _verdicts:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a graph is being captured, and the Gluon kernel is not tested yet"
        try:
            _verdicts[key] = _difference(q.device, q.dtype, q.shape[3], keys, values)
        except Exception as error:  # whatever the compiler or the driver raises is the verdict
            _verdicts[key] = f"the Gluon kernel fails: {type(error).__name__}: {str(error)[:200]}"
        if _verdicts[key]:
            warn_once(_verdicts[key])
    return _verdicts[key]


def _difference(device, dtype, D, keys, values):
    n_heads, n_rows = 2, 150
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4 * n_heads, 1, D, generator=random).to(device, dtype)
    sides = []
    for side in (keys, values):
        x = torch.randn(1, n_heads, n_rows, D, generator=random).to(device, dtype)
        kept = sparse_pack(x, keep=side.keep, layout=side.layout, group_size=side.group_size)
        sides.append(side._replace(values=kept[0], places=kept[1]))
    partials = split_kv.Partials(q, n_heads, D, [n_rows])
    attend(partials, 0, q, *sides, scaling=D**-0.5, mask=None, softcap=None)
    got = partials.merged()[0].float()
    expected = reference.sparse_attention(
        q.float(), *(x._replace(values=x.values.float()) for x in sides), scaling=D**-0.5
    )
    error = ((got - expected[0]).square().mean() / expected[0].square().mean()).sqrt().item()
    return None if error < 0.02 else f"the Gluon kernel differs from the reference by {error:.0%}"


def attend(partials, index, q, keys, values, *, scaling, mask, softcap):
    """Fill part `index` of `partials` with attention over sparse rows, of which there must be some."""
    B, Hq, S, D = q.shape
    Hkv, N = keys.values.shape[1:3]
    out, lse, grid, rows_per_split = partials.part(index)
    q = q if q.stride(3) == 1 else q.contiguous()
    k_tensors, v_tensors = sparse.side_tensors(keys)[:2], sparse.side_tensors(values)[:2]
    unit = split_kv.stride_unit(*k_tensors, *v_tensors)
    strides = [s // unit for x in (*k_tensors, *v_tensors) for s in x.stride()[:2]]
    sparse_attention_gluon_kernel[(*grid, B * Hkv)](
        q, *k_tensors, *v_tensors, q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, partials.n_rows, Hkv,
        *q.stride()[:3], *strides, *split_kv.mask_strides(mask),
        **gluon_config(D, sparse.side_format(keys, D), sparse.side_format(values, D)),
        UNIT=unit, MASK=split_kv.mask_mode(mask, S), CAP=softcap is not None,
    )  # fmt: skip


def gluon_config(D, keys, values):
    """Compile-time constants of the kernel for one format of each side, as `sparse_config` gives them to its kernel."""
    config = {"D": D}
    for name, (form, keep, _, _) in (("K", keys), ("V", values)):
        # cells of a class: all channels, nibbles or bytes; a product needs 16 of them
        width = {"index": 1, "pairs": 4}.get(form, 8 if D > 64 else 4)
        cells = max(16, triton.next_power_of_2(triton.cdiv(D, width)))
        config |= {
            f"{name}_FORM": form, f"{name}_KEEP": keep, f"{name}_W": width, f"{name}_C": cells,
            # channels loaded of a row, and their room in shared memory, with a zero behind them
            f"{name}_KP": max(16, triton.next_power_of_2(keep)),
            f"{name}_KS": cells if form == "index" else max(16, triton.next_power_of_2(keep + 1)),
            # lanes of an operand hold 4 neighbours, as the rows are loaded; what ldmatrix reads comes in twos
            f"{name}_KW": 2 if form == "index" else 4,
        }  # fmt: skip
    # wide rows of both sides on their way at once do not fit the registers (hf_kvcache.kernels.aot)
    config["V_LATE"] = values[0] == "pairs" or (values[0] == "index" and (D > 128 or values[1] > 40))
    return config | {"BM": split_kv.BLOCK_M, "NB": 4, "NR": 16, "num_warps": 4, "enable_fp_fusion": True}


@gluon.constexpr_function
def row_layout(width, vector, NB):
    """`[NB, NR, width]` with `vector` neighbours per lane and a warp per lane of the tile."""
    vector = min(vector, width)
    across = max(1, min(32, width // vector))
    return gl.BlockedLayout([1, 1, vector], [1, 32 // across, across], [NB, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def slab_widths(keep):
    """Powers of two that add up to `keep`, largest first."""
    return [1 << bit for bit in range(8, -1, -1) if keep >> bit & 1]


@gluon.constexpr_function
def n_slabs(keep):
    return len(slab_widths(keep))


@gluon.constexpr_function
def slab_width(keep, s):
    return slab_widths(keep)[s]


@gluon.constexpr_function
def slab_start(keep, s):
    return sum(slab_widths(keep)[:s])


@gluon.constexpr_function
def step(j, keep):
    """Place of channel `j` of a cell ($3) that $2 kept channels precede, and how many precede the next.

    A dropped channel has the place after the row, which holds zero. The compiler would turn the predicated addition
    into shifts and masks.
    """
    return f"""{{
        .reg .pred kept;
        .reg .b32 bit;
        and.b32 bit, $3, {1 << j};
        setp.ne.b32 kept, bit, 0;
        selp.b32 $0, $2, {keep}, kept;
        mov.b32 $1, $2;
        @kept add.s32 $1, $2, 1;
    }}"""


@gluon.jit
def row_numbers(NB: gl.constexpr, NR: gl.constexpr, L: gl.constexpr):
    """Rows `[NB, NR]` of a tile whose layout sliced by its channels is `L`."""
    return gl.arange(0, NB, gl.SliceLayout(1, L))[:, None] * NR + gl.arange(0, NR, gl.SliceLayout(0, L))[None, :]


@gluon.jit
def zeroed(NB: gl.constexpr, NR: gl.constexpr, WIDTH: gl.constexpr, DTYPE: gl.constexpr, WANTED: gl.constexpr):
    """Shared memory `[NB, NR, WIDTH]`, 16 bytes of a row in different banks from those of the next."""
    if WANTED:
        shared = gl.allocate_shared_memory(DTYPE, [NB, NR, WIDTH], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
        shared.store(gl.zeros([NB, NR, WIDTH], DTYPE, row_layout(WIDTH, 8, NB)))
        return shared
    else:
        return None


@gluon.jit
def load_rows(
    pointer, b_left, ROW: gl.constexpr, START: gl.constexpr, STOP: gl.constexpr, STEP: gl.constexpr,
    NB: gl.constexpr, NR: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Elements `(START * STEP + c) // STEP < STOP` of rows of `ROW` elements, `[NB, NR, WIDTH]`, zero elsewhere."""
    o_t = row_numbers(NB, NR, gl.SliceLayout(2, L))[:, :, None]
    o_c = START + gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :] // STEP
    return gl.load(pointer + (o_t * ROW + o_c), mask=(o_t < b_left) & (o_c < STOP), other=0)


@gluon.jit
def load_slab(
    values, places, b_left, KEEP: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr,
    NB: gl.constexpr, NR: gl.constexpr,
):  # fmt: skip
    """A power of two of kept values of every row and their channels."""
    L: gl.constexpr = row_layout(WIDTH, 8, NB)
    b_values = load_rows(values, b_left, KEEP, START, START + WIDTH, 1, NB, NR, WIDTH, L)
    return b_values, load_rows(places, b_left, KEEP, START, START + WIDTH, 1, NB, NR, WIDTH, L)


@gluon.jit
def load_side(
    values, places, i_n, stop, D: gl.constexpr, FORM: gl.constexpr, KEEP: gl.constexpr, KP: gl.constexpr,
    W: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, NR: gl.constexpr,
):  # fmt: skip
    """Packed rows from `i_n` on in registers: value and place tiles in turn."""
    b_left = gl.minimum(gl.maximum(stop - i_n, 0), NB * NR).to(gl.int32)
    values += i_n * KEEP
    if FORM == "index":
        places += i_n * KEEP
        b_rows = ()
        for s in gl.static_range(n_slabs(KEEP)):
            b_rows += load_slab(values, places, b_left, KEEP, slab_start(KEEP, s), slab_width(KEEP, s), NB, NR)
        return b_rows
    else:
        CELLS: gl.constexpr = row_layout(C, C // 4, NB)
        BYTES: gl.constexpr = D // 8
        b_places = load_rows(places + i_n * BYTES, b_left, BYTES, 0, BYTES, 8 // W, NB, NR, C, CELLS)
        if FORM == "pairs":
            pairs = values.to(gl.pointer_type(gl.int32), bitcast=True)
            return load_rows(pairs, b_left, KEEP // 2, 0, KEEP // 2, 1, NB, NR, C, CELLS), b_places
        else:
            return load_rows(values, b_left, KEEP, 0, KEEP, 1, NB, NR, KP, row_layout(KP, 8, NB)), b_places


@gluon.jit
def cells_of(b_byte, W: gl.constexpr, C: gl.constexpr, L: gl.constexpr):
    """Cells of `W` bits from the bytes that hold them, int32."""
    b_cell = b_byte.to(gl.int32)
    if W < 8:
        o_c = gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
        b_cell = (b_cell >> (o_c * W % 8)) & ((1 << W) - 1)
    return b_cell


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def turned(b_x, TURN: gl.constexpr, L: gl.constexpr):
    """`[NB, NR, C]`, or `[NB, C, NR]` where values are wanted, in layout `L`."""
    return gl.convert_layout(gl.permute(b_x, (0, 2, 1)) if TURN else b_x, L)


@gluon.jit
def side_tiles(
    b_rows, shared, DTYPE: gl.constexpr, FORM: gl.constexpr, KEEP: gl.constexpr, KP: gl.constexpr,
    W: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, NR: gl.constexpr, TURN: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """Packed rows to `W` operands; operand `j` holds channel `W * c + j` of every cell `c`, `TURN` puts cells first."""
    if FORM == "index":
        shared.store(gl.zeros([NB, NR, C], DTYPE, row_layout(C, 8, NB)))
        for s in gl.static_range(n_slabs(KEEP)):
            shared.scatter(b_rows[2 * s], b_rows[2 * s + 1].to(gl.int32), axis=2)
        return ((shared.permute((0, 2, 1)) if TURN else shared).load(A),)
    else:
        b_cell = cells_of(b_rows[1], W, C, row_layout(C, C // 4, NB))
        b_tiles = ()
        if FORM == "pairs":
            b_cell, b_pair = turned(b_cell, TURN, A), turned(b_rows[0], TURN, A)
            for j in gl.static_range(W):
                # the first channel of four can only be the first of two, the last only the second
                if j == 0:
                    b_x = b_pair
                elif j == 3:
                    b_x = b_pair >> 16
                else:
                    b_x = gl.where((b_cell & ((1 << j) - 1)) == 0, b_pair, b_pair >> 16)
                b_x = gl.where((b_cell & (1 << j)) != 0, b_x, 0)
                b_tiles += (b_x.to(gl.int16).to(DTYPE, bitcast=True),)
        else:
            shared.slice(0, KP, 2).store(b_rows[0])
            b_count = gl.inline_asm_elementwise(COUNT, "=r,r", [b_cell], dtype=gl.int32, is_pure=True, pack=1)
            # both numbers of a cell in one word: it changes layout once
            b_cell = turned(((gl.associative_scan(b_count, 2, plus) - b_count) << 8) | b_cell, TURN, A)
            b_rank = b_cell >> 8
            for j in gl.static_range(W):
                b_at, b_rank = gl.inline_asm_elementwise(
                    step(j, KEEP), "=&r,=&r,r,r", [b_rank, b_cell], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
                )
                b_tiles += ((shared.permute((0, 2, 1)) if TURN else shared).gather(b_at, axis=1 if TURN else 2),)
        return b_tiles


@gluon.jit(do_not_specialize=["N", "rows_per_split", "S", "n_rows", "Hkv", "sq_b", "sq_h", "sq_s",
                              "sk_b", "sk_h", "skp_b", "skp_h", "sv_b", "sv_h", "svp_b", "svp_h",
                              "sm_b", "sm_h", "sm_s", "sm_n"])  # fmt: skip
def sparse_attention_gluon_kernel(
    q, k_values, k_places, v_values, v_places, mask, out, lse,
    scaling, softcap, N, rows_per_split, S, n_rows, Hkv,
    sq_b, sq_h, sq_s, sk_b, sk_h, skp_b, skp_h, sv_b, sv_h, svp_b, svp_h, sm_b, sm_h, sm_s, sm_n,
    D: gl.constexpr,
    K_FORM: gl.constexpr, K_KEEP: gl.constexpr, K_KP: gl.constexpr, K_KS: gl.constexpr,
    K_W: gl.constexpr, K_C: gl.constexpr, K_KW: gl.constexpr,
    V_FORM: gl.constexpr, V_KEEP: gl.constexpr, V_KP: gl.constexpr, V_KS: gl.constexpr,
    V_W: gl.constexpr, V_C: gl.constexpr, V_KW: gl.constexpr, V_LATE: gl.constexpr,
    BM: gl.constexpr, NB: gl.constexpr, NR: gl.constexpr, UNIT: gl.constexpr, MASK: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[NB, 1, 1], instr_shape=[1, 16, 8])
    KEYS: gl.constexpr = gl.DotOperandLayout(0, MMA, K_KW)
    VALUES: gl.constexpr = gl.DotOperandLayout(0, MMA, V_KW)
    QUERY: gl.constexpr = gl.DotOperandLayout(1, MMA, K_KW)
    WEIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, V_KW)

    i_m, i_split, i_bh = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    k_values += (i_b * sk_b + i_h * sk_h) * UNIT
    k_places += (i_b * skp_b + i_h * skp_h) * UNIT
    v_values += (i_b * sv_b + i_h * sv_h) * UNIT
    v_places += (i_b * svp_b + i_h * svp_h) * UNIT
    mask += i_b * sm_b + i_h * sm_h

    # one operand [NB, K_C, BM] of the query and one accumulator [NB, V_C, BM] per class
    o_m = i_m * BM + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))
    o_c = gl.arange(0, K_C, gl.SliceLayout(0, gl.SliceLayout(2, QUERY)))
    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S) * sq_h + (o_m % S).to(gl.int64) * sq_s
    o_none = gl.zeros([NB, K_C, BM], gl.int32, QUERY)
    b_q, b_o = (), ()
    for j in gl.static_range(K_W):
        m_q = (o_c * K_W + j < D)[None, :, None] & (o_m < n_rows)[None, None, :]
        b_q += (gl.load(p_q[None, None, :] + (o_none + (o_c * K_W + j)[None, :, None]), mask=m_q, other=0.0),)
    for _ in gl.static_range(V_W):
        b_o += (gl.zeros([NB, V_C, BM], gl.float32, MMA),)
    b_m = gl.full([NB, BM], NEG_INF, gl.float32, gl.SliceLayout(1, MMA))
    b_l = gl.zeros([NB, NR, BM], gl.float32, MMA)

    k_shared = zeroed(NB, NR, K_KS, DTYPE, K_FORM != "pairs")
    v_shared = zeroed(NB, NR, V_KS, DTYPE, V_FORM != "pairs")
    o_t = row_numbers(NB, NR, gl.SliceLayout(2, MMA))
    o_s = (i_m * BM + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))) % S
    # 64-bit row numbers: row * D passes 2**31 in long caches
    start = i_split.to(gl.int64) * rows_per_split
    stop = gl.minimum(start + rows_per_split, N)
    b_k_rows = load_side(k_values, k_places, start, stop, D, K_FORM, K_KEEP, K_KP, K_W, K_C, NB, NR)
    b_v_rows = load_side(v_values, v_places, start, stop, D, V_FORM, V_KEEP, V_KP, V_W, V_C, NB, NR)
    for i_n in range(start, stop, NB * NR):
        b_left = (stop - i_n).to(gl.int32)
        i_next = i_n + NB * NR
        if V_LATE:
            b_v_rows = load_side(v_values, v_places, i_n, stop, D, V_FORM, V_KEEP, V_KP, V_W, V_C, NB, NR)
        b_k = side_tiles(b_k_rows, k_shared, DTYPE, K_FORM, K_KEEP, K_KP, K_W, K_C, NB, NR, False, KEYS)
        # the next rows travel while these are computed with
        b_k_rows = load_side(k_values, k_places, i_next, stop, D, K_FORM, K_KEEP, K_KP, K_W, K_C, NB, NR)
        b_s = gl.zeros([NB, NR, BM], gl.float32, MMA)
        for j in gl.static_range(K_W):
            b_s = mma_v2(b_k[j], b_q[j], b_s)
        b_s = capped(b_s * scaling, softcap, CAP)
        b_s = gl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        b_m_new = gl.maximum(b_m, gl.max(b_s, 1))
        # a lane that has seen nothing yet keeps -inf: subtract 0 there, not -inf - -inf
        b_base = gl.where(b_m_new == NEG_INF, 0.0, b_m_new)
        b_carry = gl.exp2(b_m - b_base)[:, None, :]
        b_p = gl.exp2(b_s - b_base[:, None, :])
        b_m, b_l = b_m_new, b_l * b_carry + b_p
        b_weight = gl.convert_layout(b_p.to(DTYPE), WEIGHT)
        b_v = side_tiles(b_v_rows, v_shared, DTYPE, V_FORM, V_KEEP, V_KP, V_W, V_C, NB, NR, True, VALUES)
        if not V_LATE:
            b_v_rows = load_side(v_values, v_places, i_next, stop, D, V_FORM, V_KEEP, V_KP, V_W, V_C, NB, NR)
        b_o_new = ()
        for j in gl.static_range(V_W):
            b_o_new += (mma_v2(b_v[j], b_weight, b_o[j] * b_carry),)
        b_o = b_o_new

    # lanes meet: as lane_shares and the end of sparse_attention_fwd_kernel
    b_top = gl.max(b_m, 0)
    b_base = gl.where(b_top == NEG_INF, 0.0, b_top)
    b_share = gl.exp2(b_m - b_base[None, :])
    b_total = gl.sum(gl.sum(b_l, 1) * b_share, 0)
    b_seen = gl.where(b_total > 0, b_total, 1.0)
    b_lse = gl.where(b_total > 0, b_base / LOG2E + gl.log(b_seen), NEG_INF)
    b_share = (b_share / b_seen[None, :])[:, None, :]
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    i_row = (i_split * gl.num_programs(2) + i_bh) * n_rows
    o_row = i_m * BM + gl.arange(0, BM, gl.SliceLayout(0, OUT))
    o_c = gl.arange(0, V_C, gl.SliceLayout(1, OUT))
    for j in gl.static_range(V_W):
        b_x = gl.sum(b_o[j] * b_share, 0)
        o_d = (o_c * V_W + j)[:, None]
        gl.store(out + (i_row + o_row)[None, :] * D + o_d, b_x, mask=(o_d < D) & (o_row < n_rows)[None, :])
    o_row = i_m * BM + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))
    gl.store(lse + i_row + o_row, b_lse, mask=o_row < n_rows)
