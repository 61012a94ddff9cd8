// Scores and weighted sums of sparse rows that are expanded in registers (AVX2, AVX-512); the tiles are those of attention.h.
#pragma once

#include "sparse_rows.h"

namespace register_tiles {

using attention::State;
using simd::LANES;
using simd::vfloat;
using sparse_rows::BLOCK;
using sparse_rows::Kept;

// ---- scores ----

// Dot products of Q queries with R rows; Q * R == LANES, so they fit one register.
template <int Q, int R, class T>
inline void score_tile(const float* q, int64_t width, const T** at, const uint64_t* const* masks, float* scores) {
    vfloat sums[Q * R];
#pragma GCC unroll 16
    for (int i = 0; i < Q * R; i++) sums[i] = vfloat{};
    for (int64_t block = 0; block < width / BLOCK; block++) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const uint32_t mask = sparse_rows::block_mask(masks[r], block);
            vfloat k[2];
            sparse_rows::expand(at[r], mask, k);
            at[r] += __builtin_popcount(mask);
#pragma GCC unroll 16
            for (int i = 0; i < Q; i++) {
                const float* x = q + i * width + block * BLOCK;
                sums[i * R + r] = simd::fma(simd::load(x), k[0], sums[i * R + r]);
                sums[i * R + r] = simd::fma(simd::load(x + LANES), k[1], sums[i * R + r]);
            }
        }
    }
    float flat[LANES];
    simd::store(flat, simd::sum_each(sums));
    for (int i = 0; i < Q; i++) std::memcpy(scores + i * attention::CHUNK, flat + i * R, R * sizeof(float));
}

#if defined(__AVX512BF16__)
// The same with queries as they came, bfloat16 and not scaled: `dpbf16` takes 32 products, exact in float32.
template <int Q, int R>
inline void score_tile(const simd::bf16* q, int64_t width, float scaling, const simd::bf16** at, const uint64_t* const* masks, float* scores) {
    vfloat sums[Q * R];
#pragma GCC unroll 16
    for (int i = 0; i < Q * R; i++) sums[i] = vfloat{};
    for (int64_t block = 0; block < width / BLOCK; block++) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const uint32_t mask = sparse_rows::block_mask(masks[r], block);
            const __m512bh k = (__m512bh)sparse_rows::expand_words(at[r], mask);
            at[r] += __builtin_popcount(mask);
#pragma GCC unroll 16
            for (int i = 0; i < Q; i++)
                sums[i * R + r] = _mm512_dpbf16_ps(sums[i * R + r], k, (__m512bh)_mm512_loadu_si512(q + i * width + block * BLOCK));
        }
    }
    float flat[LANES];
    simd::store(flat, simd::sum_each(sums) * simd::splat(scaling));
    for (int i = 0; i < Q; i++) std::memcpy(scores + i * attention::CHUNK, flat + i * R, R * sizeof(float));
}
#endif

template <class T>
constexpr bool unscaled() {
#if defined(__AVX512BF16__)
    return std::is_same_v<T, simd::bf16>;
#else
    return false;
#endif
}

template <int Q, class T, class Prefetch>
void score_block(const State& state, int first, const Kept<T>& kept, const uint64_t* masks, int64_t words, int n, [[maybe_unused]] float scaling, Prefetch& prefetch) {
    constexpr int R = LANES / Q;
    for (int t = 0; t < n; t += R) {
        prefetch.fetch(t, R);
        const T* at[R];
        const uint64_t* mask[R];
        // past the end the last row is scored again; `soften` overwrites those scores
        for (int r = 0; r < R; r++) {
            const int row = std::min(t + r, n - 1);
            at[r] = kept.first + row * kept.stride, mask[r] = masks + row * words;
        }
        float* scores = state.scores + first * attention::CHUNK + t;
        if constexpr (unscaled<T>()) {
            score_tile<Q, R>(reinterpret_cast<const T*>(state.q) + first * state.width, state.width, scaling, at, mask, scores);
        } else {
            score_tile<Q, R>(state.q + first * state.width, state.width, at, mask, scores);
        }
    }
}

template <class T, class Prefetch>
void score(const State& state, const Kept<T>& kept, const uint64_t* masks, int64_t words, int n, [[maybe_unused]] float scaling, Prefetch& prefetch) {
    for (int i = 0; i < state.n_q;) {
        const int left = state.n_q - i;
        if (left >= 4) {
            score_block<4>(state, i, kept, masks, words, n, scaling, prefetch), i += 4;
        } else if (left >= 2) {
            score_block<2>(state, i, kept, masks, words, n, scaling, prefetch), i += 2;
        } else {
            score_block<1>(state, i, kept, masks, words, n, scaling, prefetch), i += 1;
        }
    }
}

// ---- values ----

// Blocks of channels of `n` rows from `at` on, which moves on to the next block.
template <int Q, int BLOCKS, class T, class Prefetch>
inline void add_tile(float* out, int64_t width, const float* p, const T** at, const uint64_t* masks, int64_t words,
                     int64_t first, int n, Prefetch& prefetch) {
    constexpr int C = 2 * BLOCKS;
    vfloat sums[Q][C];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) sums[i][c] = simd::load(out + i * width + c * LANES);
    for (int t = 0; t < n; t++) {
        if (t % attention::PACE == 0) prefetch.fetch(t, attention::PACE);
        const T* from = at[t];
        vfloat x[C];
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) {
            const uint32_t mask = sparse_rows::block_mask(masks + t * words, first + b);
            sparse_rows::expand(from, mask, x + 2 * b);
            from += __builtin_popcount(mask);
        }
        at[t] = from;
        for (int i = 0; i < Q; i++) {
            const vfloat weight = simd::splat(p[i * attention::CHUNK + t]);
            for (int c = 0; c < C; c++) sums[i][c] = simd::fma(weight, x[c], sums[i][c]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) simd::store(out + i * width + c * LANES, sums[i][c]);
}

template <int Q, class T, class Prefetch>
void add_block(const State& state, int first, const Kept<T>& kept, const uint64_t* masks, int64_t words, int n, Prefetch& prefetch) {
    // accumulators, values and a weight stay below the number of registers: 32 with AVX-512, else 16
    constexpr int BLOCKS = (LANES == 16 ? 2 : 1) * (Q == 4 ? 1 : 2);
    const int64_t width = state.v_width, n_blocks = width / BLOCK;
    float* out = state.out + first * width;
    const float* p = state.scores + first * attention::CHUNK;
    const T* at[sparse_rows::STEP];
    for (int t = 0; t < n; t++) at[t] = kept.first + t * kept.stride;
    const attention::Nothing nothing;
    const auto tile = [&](auto blocks, int64_t b, auto& once) {
        add_tile<Q, decltype(blocks)::value>(out + b * BLOCK, width, p, at, masks, words, b, n, once);
    };
    const auto tiles = [&](auto blocks, int64_t b) {
        b ? tile(blocks, b, nothing) : tile(blocks, b, prefetch);
        return decltype(blocks)::value;
    };
    int64_t b = 0;
    while (b + BLOCKS <= n_blocks) b += tiles(std::integral_constant<int, BLOCKS>(), b);
    while (b < n_blocks) b += tiles(std::integral_constant<int, 1>(), b);
}

template <class T, class Prefetch>
void add_values(const State& state, const Kept<T>& kept, const uint64_t* masks, int64_t words, int n, Prefetch& prefetch) {
    const auto block = [&](int i, int left, auto& once) {
        if (left >= 4) return add_block<4>(state, i, kept, masks, words, n, once), 4;
        if (left >= 2) return add_block<2>(state, i, kept, masks, words, n, once), 2;
        return add_block<1>(state, i, kept, masks, words, n, once), 1;
    };
    const attention::Nothing nothing;
    for (int i = block(0, state.n_q, prefetch); i < state.n_q;) i += block(i, state.n_q - i, nothing);
}

}  // namespace register_tiles
