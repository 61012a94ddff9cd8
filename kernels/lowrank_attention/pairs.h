// Scores and weighted sums of latents as pairs of bfloat16 (`dpbf16`); sums are float32.
#pragma once

#include "prefetch.h"

namespace pairs {

using attention::CHUNK;
using attention::State;
using latents::Rows;
using simd::bf16;
using simd::LANES;
using simd::vfloat;

// ---- scores of queries that were projected ----

// Dot products of Q queries with R rows; Q * R == LANES, so they fit one register.
template <int Q, int R>
__attribute__((noinline)) void score_tile(const bf16* q, int64_t width, const bf16* const* rows, float* scores) {
    vfloat sums[Q * R];
#pragma GCC unroll 16
    for (int i = 0; i < Q * R; i++) sums[i] = vfloat{};
    for (int64_t d = 0; d < width; d += 32) {
        __m512bh k[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) k[r] = (__m512bh)_mm512_loadu_si512(rows[r] + d);
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) {
            const __m512bh x = (__m512bh)_mm512_loadu_si512(q + i * width + d);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sums[i * R + r] = _mm512_dpbf16_ps(sums[i * R + r], k[r], x);
        }
    }
    float flat[LANES];
    simd::store(flat, simd::sum_each(sums));
    for (int i = 0; i < Q; i++) std::memcpy(scores + i * CHUNK, flat + i * R, R * sizeof(float));
}

template <int Q>
void score_block(const State& state, int first, const bf16* q, int64_t width, const Rows<bf16>& rows, int n,
                 latents::Prefetch& prefetch) {
    constexpr int R = LANES / Q;
    for (int t = 0; t < n; t += R) {
        prefetch.did(LANES * (width + latents::DOT));
        const bf16* at[R];
        // past the end the last row is scored again; `soften` overwrites those scores
        for (int r = 0; r < R; r++) at[r] = rows.first + std::min(t + r, n - 1) * rows.stride;
        score_tile<Q, R>(q + first * width, width, at, state.scores + first * CHUNK + t);
    }
}

// Raw dot products to scores of rows.
inline void finish_scores(const State& state, const bf16* q, int64_t width, float scaling, const Rows<bf16>& rows,
                          int n) {
    for (int i = 0; i < state.n_q; i++) {
        float* scores = state.scores + i * CHUNK;
        float sum = 0;
        if (rows.scale)
            for (int64_t d = 0; d < width; d++) sum += simd::to_float(q[i * width + d]);
        for (int t = 0; t < n; t += LANES) {
            vfloat x = simd::load(scores + t);
            if (rows.scale) x = simd::fma(x, simd::load(rows.scale + t), simd::load(rows.zero + t) * simd::splat(sum));
            simd::store(scores + t, x * simd::splat(scaling));
        }
    }
}

// `q`: queries as they came, `[n_q, width]`, zeros from the rank on; so are the rows.
inline void score(const State& state, const bf16* q, int64_t width, float scaling, const Rows<bf16>& rows, int n,
                  latents::Prefetch& prefetch) {
    for (int i = 0; i < state.n_q;) {
        const int left = state.n_q - i;
        if (left >= 4) {
            score_block<4>(state, i, q, width, rows, n, prefetch), i += 4;
        } else if (left >= 2) {
            score_block<2>(state, i, q, width, rows, n, prefetch), i += 2;
        } else {
            score_block<1>(state, i, q, width, rows, n, prefetch), i += 1;
        }
    }
    finish_scores(state, q, width, scaling, rows, n);
}

// ---- weighted sums ----

constexpr int COLUMNS = 64;  // of one block: 4 registers of sums

// Weights as factors, `[n_q, CHUNK]`: times the scale of their rows; zero points are added to the outputs here.
inline void weigh(const State& state, const Rows<bf16>& rows, int n, bf16* weights) {
    for (int i = 0; i < state.n_q; i++) {
        const float* p = state.scores + i * CHUNK;
        vfloat offset = {};
        for (int t = 0; t < n; t += LANES) {
            const __mmask16 some = n - t >= LANES ? 0xffff : (1u << (n - t)) - 1;
            vfloat x = _mm512_maskz_loadu_ps(some, p + t);
            if (rows.scale) {
                offset = simd::fma(x, (vfloat)_mm512_maskz_loadu_ps(some, rows.zero + t), offset);
                x *= (vfloat)_mm512_maskz_loadu_ps(some, rows.scale + t);
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i * CHUNK + t), (__m256i)_mm512_cvtneps_pbh(x));
        }
        if (!rows.scale) continue;
        const vfloat total = simd::splat(simd::sum(offset));
        for (int64_t d = 0; d < state.v_width; d += LANES) {
            float* out = state.out + i * state.v_width + d;
            simd::store(out, simd::load(out) + total);
        }
    }
}

// For two registers: their 16-bit lanes in turn, the first half of them and the second.
struct Turns {
    uint16_t low[32], high[32];
    constexpr Turns() : low(), high() {
        for (int i = 0; i < 32; i++) low[i] = uint16_t(i / 2 + i % 2 * 32), high[i] = uint16_t(low[i] + 16);
    }
};
alignas(64) constexpr Turns TURNS;

// Channels `[d, d + COLUMNS)` of rows side by side in pairs: `[n / 2, 4 registers]`.
inline void interleave(const Rows<bf16>& rows, int64_t rank, int64_t d, int n, int n_q, bf16* out,
                       latents::Prefetch& prefetch) {
    const __m512i low = _mm512_load_si512(TURNS.low), high = _mm512_load_si512(TURNS.high);
    for (int t = 0; t < n; t += 2) {
        prefetch.did(2 * COLUMNS * n_q);
        for (int64_t i = 0; i < COLUMNS; i += 32, out += 64) {
            const int64_t left = rank - d - i;
            const __mmask32 some = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
            const bf16* row = rows.first + t * rows.stride + (left > 0 ? d + i : 0);
            const __m512i a = _mm512_maskz_loadu_epi16(some, row);
            const __m512i b = t + 1 < n ? _mm512_maskz_loadu_epi16(some, row + rows.stride) : _mm512_setzero_si512();
            _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// The same for all channels of codes of 2 or 4 bits, block after block, where these lie in whole blocks of 16 words:
// words take turns before they are decoded.
template <int BITS>
void interleave_codes(const uint16_t* words, int64_t stride, int64_t rank, int n, int n_q, bf16* out,
                      latents::Prefetch& prefetch) {
    const __m512i low = _mm512_load_si512(TURNS.low), table = latents::code_table<BITS>(),
                  mask = _mm512_set1_epi16((1 << BITS) - 1);
    const int64_t W = rank * BITS / 16, steps = (n + 1) / 2;
    for (int step = 0; step < steps; step++, words += 2 * stride) {
        prefetch.did(2 * rank * n_q);
        for (int64_t j = 0; j < W; j += 16) {
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + j));
            // past the end the last row takes both turns: its second weight is zero
            const uint16_t* next = words + j + (2 * step + 1 < n ? stride : 0);
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next));
            const __m512i x = _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), low, _mm512_castsi256_si512(b));
#pragma GCC unroll 8
            for (int f = 0; f < 16 / BITS; f++) {
                const int64_t d = f * W + j;
                const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(x, BITS * f), mask);
                bf16* to = out + (d / COLUMNS * steps + step) * 4 * 32 + d % COLUMNS * 2;
                _mm512_store_si512(to, _mm512_permutexvar_epi16(codes, table));
            }
        }
    }
}

template <int M, int C>
__attribute__((noinline)) void add_block(const State& state, int first, const bf16* weights, int64_t d,
                                         const bf16* block, int64_t steps) {
    const bf16* a[M];
    vfloat sums[M][C];
    float* out = state.out + first * state.v_width + d;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        a[m] = weights + (first + m) * CHUNK;
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sums[m][c] = simd::load(out + m * state.v_width + c * LANES);
    }
    products::multiply<M, C>(
        a, steps,
        [&](int64_t step, auto* x) {
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) x[c] = (__m512bh)_mm512_load_si512(block + (step * 4 + c) * 32);
        },
        sums);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) simd::store(out + m * state.v_width + c * LANES, sums[m][c]);
}

template <int C>
inline void add_queries(const State& state, const bf16* weights, int64_t d, const bf16* block, int64_t steps) {
    int i = 0;
    // eight rows leave registers for two columns at a time
    constexpr int SOME = C < 2 ? 1 : 2;
    for (; i + 8 <= state.n_q; i += 8)
        for (int c = 0; c < C; c += SOME) add_block<8, SOME>(state, i, weights, d + c * LANES, block + c * 32, steps);
    for (; i + 4 <= state.n_q; i += 4) add_block<4, C>(state, i, weights, d, block, steps);
    for (; i + 2 <= state.n_q; i += 2) add_block<2, C>(state, i, weights, d, block, steps);
    if (i < state.n_q) add_block<1, C>(state, i, weights, d, block, steps);
}

// Adds rows `[first, first + n)` of a group to the outputs of its queries. `block` holds CHUNK rows of whole blocks.
template <class T>
void add_values(const State& state, const latents::Side& side, int64_t b, int64_t group, int64_t first, int n,
                const latents::Room& room, bf16* weights, bf16* block, latents::Prefetch& prefetch) {
    const int64_t rank = side.rank, steps = (n + 1) / 2, bits = side.plane.bits;
    const bool coded = (bits == 4 || bits == 2) && side.plane.n_groups == 1 && rank * bits % 256 == 0;
    Rows<bf16> rows{};
    if (coded) {
        const packed_rows::Rows packed(side.plane, b, group, rank, side.plane.n_scales);
        const uint16_t* words = latents::at<uint16_t>(side, b, group, first);
        latents::read_grid(packed, first, n, room);
        rows.scale = room.scale, rows.zero = room.zero;
        bits == 4 ? interleave_codes<4>(words, side.plane.row, rank, n, state.n_q, block, prefetch)
                  : interleave_codes<2>(words, side.plane.row, rank, n, state.n_q, block, prefetch);
    } else {
        rows = latents::rows<T, bf16>(side, b, group, first, n, 1, room);
    }
    weigh(state, rows, n, weights);
    for (int64_t d = 0; d < rank; d += COLUMNS) {
        if (!coded) interleave(rows, rank, d, n, state.n_q, block, prefetch);
        const int64_t registers = (std::min<int64_t>(COLUMNS, state.v_width - d) + LANES - 1) / LANES;
        if (registers == 4) {
            add_queries<4>(state, weights, d, block, steps);
        } else {
            for (int64_t c = 0; c < registers; c++)
                add_queries<1>(state, weights, d + c * LANES, block + c * 32, steps);
        }
        if (coded) block += steps * 4 * 32;
    }
}

}  // namespace pairs
