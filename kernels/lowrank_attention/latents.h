// Latents of a group of heads and their way to the factors of a product.
#pragma once

#include "packed_rows.h"
#include "products.h"

namespace latents {

using attention::CHUNK;
using simd::bf16;

struct Side {
    packed_rows::Plane plane;  // bits 0: latents in the dtype of the query
    int64_t rank, heads;       // heads: KV heads that share a group
};

// Factors of a row are followed by zeros up to a multiple of this.
inline int64_t padded(int64_t rank) { return (rank + 31) / 32 * 32; }

// Rows as factors. Codes of one scale a row stay codes, minus their centre: the row is `scale * x + zero`.
template <class X>
struct Rows {
    const X* first;
    int64_t stride;
    const float *scale = nullptr, *zero = nullptr;
};

template <class T>
const T* at(const Side& side, int64_t b, int64_t group, int64_t start) {
    return reinterpret_cast<const T*>(side.plane.codes) + b * side.plane.batch + group * side.plane.head +
           start * side.plane.row;
}

#if defined(__AVX512BF16__)

inline void narrow(const float* x, int64_t n, bf16* out) {
    for (int64_t d = 0; d < n; d += 16) {
        const __mmask16 some = n - d >= 16 ? 0xffff : (1u << (n - d)) - 1;
        _mm256_mask_storeu_epi16(out + d, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + d)));
    }
}

// Codes minus their centre are exact in bfloat16.
template <int BITS>
inline __m512i code_table() {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; i++)
        table[i] = simd::from_float<bf16>(float(i & ((1 << BITS) - 1)) - ((1 << BITS) - 1) / 2.0f).bits;
    return _mm512_load_si512(table);
}

// Rows of 2 or 4 bits: a field of 16 or more words is as many neighbouring channels.
template <int BITS>
inline void decode_row(const uint16_t* words, int64_t W, __m512i table, bf16* out) {
    constexpr int FIELDS = 16 / BITS;
    const __m512i mask = _mm512_set1_epi16((1 << BITS) - 1);
    if (W == 16) {
        // two fields of the same words fill a register
        const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
        const __m512i apart = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(BITS), 1);
#pragma GCC unroll 8
        for (int f = 0; f < FIELDS; f += 2) {
            const __m512i shift = _mm512_add_epi16(apart, _mm512_set1_epi16(BITS * f));
            const __m512i codes = _mm512_and_si512(_mm512_srlv_epi16(both, shift), mask);
            _mm512_storeu_si512(out + f * 16, _mm512_permutexvar_epi16(codes, table));
        }
        return;
    }
    for (int64_t j = 0; j < W; j += 32) {
        const __mmask32 some = W - j >= 32 ? ~0u : (1u << (W - j)) - 1;
        const __m512i x = _mm512_maskz_loadu_epi16(some, words + j);
#pragma GCC unroll 8
        for (int f = 0; f < FIELDS; f++) {
            const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(x, BITS * f), mask);
            _mm512_mask_storeu_epi16(out + f * W + j, some, _mm512_permutexvar_epi16(codes, table));
        }
    }
}

inline void decode_row(const uint16_t* words, int64_t rank, bf16* out) {
    const int64_t W = rank / 2;
    const __m512 centre = _mm512_set1_ps(127.5f);
    for (int64_t j = 0; j < W; j += 16) {
        const __mmask16 some = W - j >= 16 ? 0xffff : (1u << (W - j)) - 1;
        const __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, words + j));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(255)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 8));
        _mm256_mask_storeu_epi16(out + j, some, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(low, centre)));
        _mm256_mask_storeu_epi16(out + W + j, some, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(high, centre)));
    }
}

// `n` rows of codes minus their centre, `[n, padded(rank)]`. `wide` holds a row of float32.
inline void decode(const Side& side, const uint16_t* words, int n, bf16* out, float* wide) {
    const int64_t rank = side.rank, width = padded(rank), step = side.plane.row, W = rank * side.plane.bits / 16;
    const auto each = [&](auto row) {
        for (int t = 0; t < n; t++) row(words + t * step, out + t * width);
    };
    if (rank < width) each([&](auto, bf16* to) { std::fill(to + rank, to + width, bf16{}); });
    switch (side.plane.bits) {
        case 8: return each([&](const uint16_t* from, bf16* to) { decode_row(from, rank, to); });
        case 4:
            return each(
                [&, table = code_table<4>()](const uint16_t* from, bf16* to) { decode_row<4>(from, W, table, to); });
        case 2:
            return each(
                [&, table = code_table<2>()](const uint16_t* from, bf16* to) { decode_row<2>(from, W, table, to); });
        default:
            each([&](const uint16_t* from, bf16* to) {
                packed_rows::decode(side.plane.bits, from, rank, wide);
                narrow(wide, rank, to);
            });
    }
}

#endif

// Numbers of 16 bits, `stride` apart, as float32.
inline void gather(const simd::f16* from, int64_t stride, int n, float* out) {
    if (stride == 1) return attention::widen(from, 0, 1, n, out);
    for (int t = 0; t < n; t++) out[t] = simd::to_float(from[t * stride]);
}

// Scratch of one chunk of rows.
struct Room {
    void* rows;           // CHUNK * padded(rank) floats
    float *scale, *zero;  // CHUNK each
    float* channels;      // 3 * padded(rank)

    static int64_t floats(int64_t rank) { return (CHUNK + 3) * padded(rank) + 2 * CHUNK; }
    Room() = default;
    Room(float* memory, int64_t rank)
        : rows(memory), scale(memory + CHUNK * padded(rank)), zero(scale + CHUNK), channels(zero + CHUNK) {}
};

// Scales and zeros of rows of one group.
inline void read_grid(const packed_rows::Rows& packed, int64_t start, int n, const Room& room) {
    const packed_rows::Plane& p = *packed.plane;
    gather(packed.scale + start * p.scale_row, p.scale_row, n, room.scale);
    gather(packed.zero + start * p.zero_row, p.zero_row, n, room.zero);
}

// Rows `[start, start + n)` of a group as factors whose width is a multiple of `quantum`; in place where they are that.
template <class T, class X>
Rows<X> rows(const Side& side, int64_t b, int64_t group, int64_t start, int n, int64_t quantum, const Room& room) {
    const int64_t rank = side.rank;
    X* out = static_cast<X*>(room.rows);
    if (side.plane.bits) {
        const packed_rows::Rows packed(side.plane, b, group, rank, side.plane.n_scales);
        if constexpr (std::is_same_v<X, float>) {
            packed_rows::decode_rows(packed, start, n, out, room.channels);
            return {out, attention::padded(rank)};
        }
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<X, bf16>) {
            const int64_t width = padded(rank);
            if (side.plane.n_groups == 1) {
                decode(side, at<uint16_t>(side, b, group, start), n, out, room.channels);
                read_grid(packed, start, n, room);
                return {out, width, room.scale, room.zero};
            }
            float *wide = room.channels, *channels = wide + width;
            for (int t = 0; t < n; t++) {
                packed_rows::decode_rows(packed, start + t, 1, wide, channels);
                narrow(wide, rank, out + t * width);
                std::fill(out + t * width + rank, out + (t + 1) * width, X{});
            }
            return {out, width};
        }
#endif
    }
    const T* from = at<T>(side, b, group, start);
    if constexpr (std::is_same_v<T, X>) {
        if (rank % quantum == 0) return {from, side.plane.row};
        const int64_t width = padded(rank);
        for (int t = 0; t < n; t++) {
            std::copy(from + t * side.plane.row, from + t * side.plane.row + rank, out + t * width);
            std::fill(out + t * width + rank, out + (t + 1) * width, X{});
        }
        return {out, width};
    } else {
        attention::widen(from, side.plane.row, n, rank, out);
        return {out, attention::padded(rank)};
    }
}

}  // namespace latents
