// Keys rebuilt from latents: `rotate(latent @ up + mean, position)`, a few rows and all channels at a time.
#pragma once

#include "prefetch.h"

namespace expansion {

using attention::CHUNK;
using products::Factor;
using simd::LANES;
using simd::vfloat;

constexpr int TILE = 32;                   // keys that are scored at once: they stay in L1
constexpr int ROWS = LANES == 16 ? 8 : 6;  // of the micro-kernel: two sums each, of 32 registers or of 16

struct Rebuild {
    int64_t up, up_head, up_row, mean, mean_head;
    int64_t positions, positions_batch, positions_head, coarse, fine, n_coarse, n_fine, half;  // half: rotated pairs
};

// Channels of a rebuilt key, in registers: first and second halves of the rotated pairs in turn, so that a block of two
// holds both ends of its rotations, then the channels that are not rotated.
struct Channels {
    int64_t D, half, pairs, rest;  // pairs, rest: registers

    Channels(int64_t D, int64_t half)
        : D(D), half(half), pairs((half + LANES - 1) / LANES), rest((D - 2 * half + LANES - 1) / LANES) {}
    int64_t registers() const { return 2 * pairs + rest; }
    int64_t width() const { return registers() * LANES; }
    int64_t place(int64_t d) const {
        if (d >= 2 * half) return 2 * pairs * LANES + d - 2 * half;
        const bool second = d >= half;
        const int64_t i = second ? d - half : d;
        return (i / LANES * 2 + second) * LANES + i % LANES;
    }
};

// `up` of every head, cut into blocks of columns and laid out in the order the micro-kernel reads.
template <class X>
struct Packed {
    Channels channels;
    int64_t steps;
    const X* up;        // [Hkv, steps * DEPTH * width]
    const float* mean;  // [Hkv, width]
    const float* sums;  // [Hkv, width]: of the columns of `up`, for zero points

    int64_t head_size() const { return steps * Factor<X>::DEPTH * channels.width(); }
};

// Calls f(register, count, rotated) for each block of columns.
template <class F>
inline void blocks(const Channels& channels, F f) {
    int64_t i = 0;
    for (; i < 2 * channels.pairs; i += 2) f(i, std::integral_constant<int, 2>(), std::true_type());
    for (; i + 2 <= channels.registers(); i += 2) f(i, std::integral_constant<int, 2>(), std::false_type());
    if (i < channels.registers()) f(i, std::integral_constant<int, 1>(), std::false_type());
}

// Elements of up to two rows side by side, `n` of each; `next` is null after the last row.
template <class X, class T>
inline void place_rows(const T* row, const T* next, int64_t n, X* to) {
    const auto convert = [](T x) {
        if constexpr (std::is_same_v<T, X>) {
            return x;
        } else {
            return simd::to_float(x);
        }
    };
    if constexpr (Factor<X>::DEPTH == 1) {
        for (int64_t i = 0; i < n; i++) to[i] = convert(row[i]);
    } else if (next) {
        for (int64_t i = 0; i < n; i++) to[2 * i] = convert(row[i]), to[2 * i + 1] = convert(next[i]);
    } else {
        for (int64_t i = 0; i < n; i++) to[2 * i] = convert(row[i]);
    }
}

// Packs one head.
template <class T, class X>
void pack_head(const Rebuild& rebuild, const Channels& channels, int64_t rank, int64_t head, X* up, float* mean,
               float* sums) {
    constexpr int DEPTH = Factor<X>::DEPTH;
    const int64_t width = channels.width(), steps = (rank + DEPTH - 1) / DEPTH, D = channels.D;
    const T* from = reinterpret_cast<const T*>(rebuild.up) + head * rebuild.up_head;
    std::fill(up, up + steps * DEPTH * width, X{});
    std::fill(mean, mean + width, 0.0f);
    std::fill(sums, sums + width, 0.0f);
    // channels that stay neighbours, a register at most
    for (int64_t d = 0, n; d < D; d += n) {
        const int64_t place = channels.place(d);
        for (n = 1; d + n < D && (place + n) % LANES && channels.place(d + n) == place + n;) n++;
        if (rebuild.mean)
            std::copy_n(reinterpret_cast<const float*>(rebuild.mean) + head * rebuild.mean_head + d, n, mean + place);
        X* block = nullptr;
        int64_t stride = 0;
        blocks(channels, [&](int64_t first, auto count, auto) {
            const int64_t inside = place - first * LANES;
            if (inside < 0 || inside >= count * LANES) return;
            block = up + first * LANES * steps * DEPTH + inside * DEPTH, stride = count * LANES * DEPTH;
        });
        const auto fill = [&](auto size) {
            float total[LANES] = {};
            for (int64_t r = 0; r < rank; r++) {
                const T* x = from + r * rebuild.up_row + d;
                for (int64_t i = 0; i < size; i++) total[i] += simd::to_float(x[i]);
                if (r % DEPTH == 0)
                    place_rows(x, r + 1 < rank ? x + rebuild.up_row : nullptr, size, block + r / DEPTH * stride);
            }
            std::copy_n(total, n, sums + place);
        };
        // a known size makes vector code
        n == LANES ? fill(std::integral_constant<int64_t, LANES>()) : fill(n);
    }
}

// Cosines and sines of `n` positions, `[n, 2, pairs * LANES]`. A position the tables do not cover gives NaN.
inline void angles(const Rebuild& rebuild, const Channels& channels, const int32_t* positions, int n, float* out) {
    const int64_t half = channels.half, width = channels.pairs * LANES;
    const float *coarse = reinterpret_cast<const float*>(rebuild.coarse),
                *fine = reinterpret_cast<const float*>(rebuild.fine);
    const int64_t coarse_sin = rebuild.n_coarse * half, fine_sin = rebuild.n_fine * half;
    for (int t = 0; t < n; t++, out += 2 * width) {
        const int64_t position = positions[t];
        if (position < 0 || position >= rebuild.n_coarse * rebuild.n_fine) {
            std::fill(out, out + 2 * width, std::numeric_limits<float>::quiet_NaN());
            continue;
        }
        const float *a = coarse + position / rebuild.n_fine * half, *b = fine + position % rebuild.n_fine * half;
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            const vfloat ac = simd::load(a + i), as = simd::load(a + coarse_sin + i);
            const vfloat bc = simd::load(b + i), bs = simd::load(b + fine_sin + i);
            simd::store(out + i, simd::fma(ac, bc, -(as * bs)));
            simd::store(out + width + i, simd::fma(as, bc, ac * bs));
        }
        for (; i < half; i++) {
            out[i] = a[i] * b[i] - a[coarse_sin + i] * b[fine_sin + i];
            out[width + i] = a[coarse_sin + i] * b[i] + a[i] * b[fine_sin + i];
        }
        for (; i < width; i++) out[i] = out[width + i] = 0.0f;
    }
}

// One row of a block: scale, mean and rotation.
template <int C, bool ROTATED>
inline void finish(const vfloat* sums, const float* mean, const float* column_sums, const float* scale,
                   const float* zero, const float* cosines, int64_t sines, float* out) {
    vfloat x[C];
    for (int c = 0; c < C; c++) {
        x[c] = simd::load(mean + c * LANES);
        x[c] = scale ? simd::fma(sums[c], simd::splat(*scale),
                                 simd::fma(simd::load(column_sums + c * LANES), simd::splat(*zero), x[c]))
                     : sums[c] + x[c];
    }
    if constexpr (ROTATED) {
        const vfloat cosine = simd::load(cosines), sine = simd::load(cosines + sines), first = x[0], second = x[1];
        x[0] = simd::fma(first, cosine, -(second * sine));
        x[1] = simd::fma(second, cosine, first * sine);
    }
    for (int c = 0; c < C; c++) simd::store(out + c * LANES, x[c]);
}

// Up to M keys from row `t` of `rows` on, the registers of one block. Past the end the last key is made again.
// Not inlined: the addresses of the rows then stay in registers.
template <int M, int C, bool ROTATED, class X>
__attribute__((noinline)) void block_of_keys(const Packed<X>& packed, int64_t head, int64_t first,
                                             const latents::Rows<X>& rows, const float* cosines, int from, int t, int n,
                                             float* keys) {
    constexpr int DEPTH = Factor<X>::DEPTH;
    const int64_t width = packed.channels.width(), sines = packed.channels.pairs * LANES;
    const X* up = packed.up + head * packed.head_size() + first * LANES * packed.steps * DEPTH;
    const X* a[M];
    int row[M];
    for (int m = 0; m < M; m++) row[m] = std::min(t + m, n - 1), a[m] = rows.first + (from + row[m]) * rows.stride;
    vfloat sums[M][C];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sums[m][c] = vfloat{};
    products::multiply<M, C>(
        a, packed.steps,
        [&](int64_t step, auto* x) {
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) x[c] = Factor<X>::load(up + (step * C + c) * LANES * DEPTH);
        },
        sums);
    const float *mean = packed.mean + head * width + first * LANES,
                *column_sums = packed.sums + head * width + first * LANES;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        const int64_t token = from + row[m];
        finish<C, ROTATED>(sums[m], mean, column_sums, rows.scale ? rows.scale + token : nullptr,
                           rows.scale ? rows.zero + token : nullptr,
                           ROTATED ? cosines + token * 2 * sines + first / 2 * LANES : nullptr, sines,
                           keys + row[m] * width + first * LANES);
    }
}

// Keys `[from, from + n)` of a chunk, `[n, width]`; n is at most TILE.
template <class X>
void rebuild_keys(const Packed<X>& packed, int64_t head, const latents::Rows<X>& rows, const float* cosines, int from,
                  int n, float* keys, latents::Prefetch& prefetch) {
    blocks(packed.channels, [&](int64_t first, auto count, auto rotated) {
        constexpr int C = decltype(count)::value;
        constexpr bool ROTATED = decltype(rotated)::value;
        int t = 0;
        for (; n - t > 2; t += ROWS) {
            prefetch.did(ROWS * C * LANES * packed.steps * Factor<X>::DEPTH);
            block_of_keys<ROWS, C, ROTATED>(packed, head, first, rows, cosines, from, t, n, keys);
        }
        if (t < n) block_of_keys<2, C, ROTATED>(packed, head, first, rows, cosines, from, t, n, keys);
    });
}

}  // namespace expansion
