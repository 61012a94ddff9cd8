// Packed rows of one KV head and their decoding to float32 (layout: README.md of quant_pack).
#pragma once

#include "attention.h"

namespace packed_rows {

struct Plane {
    int64_t codes, batch, head, row;  // int16 words
    int64_t scale, zero, scale_batch, scale_head, scale_row, zero_batch, zero_head, zero_row;  // float16
    int64_t n_scales, n_groups, bits, per_channel;
};

// One head of packed rows.
struct Rows {
    const uint16_t* codes;
    const simd::f16 *scale, *zero;
    const Plane* plane;
    int64_t D, per_scale;  // per_scale: rows that share a scale

    Rows(const Plane& p, int64_t b, int64_t h, int64_t D, int64_t n_rows)
        : codes(reinterpret_cast<const uint16_t*>(p.codes) + b * p.batch + h * p.head),
          scale(reinterpret_cast<const simd::f16*>(p.scale) + b * p.scale_batch + h * p.scale_head),
          zero(reinterpret_cast<const simd::f16*>(p.zero) + b * p.zero_batch + h * p.zero_head),
          plane(&p),
          D(D),
          per_scale(p.per_channel ? n_rows / p.n_scales : 1) {}
};

// Codes of one row, minus their centre, in channel order; the loops over words vectorise.
template <int BITS>
void decode(const uint16_t* words, int64_t D, float* out) {
    constexpr float CENTRE = ((1 << BITS) - 1) / 2.0f;
    if constexpr (BITS == 3) {
        const int64_t W = D / 8, H = D / 16;
        const uint16_t* high = words + W;
        for (int f = 0; f < 8; f++)
            for (int64_t j = 0; j < W; j++) out[f * W + j] = float(int32_t((words[j] >> (2 * f)) & 3)) - CENTRE;
        for (int f = 0; f < 16; f++)
            for (int64_t j = 0; j < H; j++) out[f * H + j] += float(int32_t((high[j] >> f) & 1) * 4);
    } else {
        const int64_t W = D * BITS / 16;
        for (int f = 0; f < 16 / BITS; f++)
            for (int64_t j = 0; j < W; j++)
                out[f * W + j] = float(int32_t((words[j] >> (BITS * f)) & ((1 << BITS) - 1))) - CENTRE;
    }
}

inline void decode(int64_t bits, const uint16_t* words, int64_t D, float* out) {
    switch (bits) {
        case 8: return decode<8>(words, D, out);
        case 4: return decode<4>(words, D, out);
        case 3: return decode<3>(words, D, out);
        default: return decode<2>(words, D, out);
    }
}

// Rows `[start, start + n)` as float32 `[n, width]`. `channels` holds 2 * width floats.
inline void decode_rows(const Rows& rows, int64_t start, int n, float* out, float* channels) {
    const Plane& p = *rows.plane;
    const int64_t D = rows.D, width = attention::padded(D), group = D / p.n_groups;
    float *scale = channels, *zero = channels + width;
    int64_t current = -1;
    for (int t = 0; t < n; t++) {
        float* x = out + t * width;
        decode(p.bits, rows.codes + (start + t) * p.row, D, x);
        std::fill(x + D, x + width, 0.0f);
        const int64_t block = (start + t) / rows.per_scale;
        const simd::f16 *s = rows.scale + block * p.scale_row, *z = rows.zero + block * p.zero_row;
        if (!p.per_channel) {
            for (int64_t g = 0; g < p.n_groups; g++) {
                const float factor = simd::to_float(s[g]), offset = simd::to_float(z[g]);
                for (int64_t d = g * group; d < (g + 1) * group; d++) x[d] = x[d] * factor + offset;
            }
            continue;
        }
        if (block != current) {
            attention::widen(s, 0, 1, D, scale);
            attention::widen(z, 0, 1, D, zero);
            current = block;
        }
        for (int64_t d = 0; d < width; d++) x[d] = x[d] * scale[d] + zero[d];
    }
}

}  // namespace packed_rows
