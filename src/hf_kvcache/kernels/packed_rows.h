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

// out[j] = field of `width` bits at `shift` of words[j], times `factor`, plus out[j] or `offset`.
template <bool ADD>
inline void decode_field(const uint16_t* words, int64_t n_words, int shift, int width, float factor, float offset, float* out) {
    const int32_t mask = (1 << width) - 1;
    int64_t j = 0;
    for (; j + simd::LANES <= n_words; j += simd::LANES) {
        const simd::vfloat code = simd::to_floats((simd::load_words(words + j) >> shift) & mask);
        const simd::vfloat base = ADD ? simd::load(out + j) : simd::splat(offset);
        simd::store(out + j, code * simd::splat(factor) + base);
    }
    for (; j < n_words; j++) out[j] = float((words[j] >> shift) & mask) * factor + (ADD ? out[j] : offset);
}

// Codes of one row, minus their centre, in channel order.
template <int BITS>
void decode(const uint16_t* words, int64_t D, float* out) {
    constexpr float CENTRE = ((1 << BITS) - 1) / 2.0f;
    if constexpr (BITS == 3) {
        const int64_t W = D / 8, H = D / 16;
        for (int f = 0; f < 8; f++) decode_field<false>(words, W, 2 * f, 2, 1.0f, -CENTRE, out + f * W);
        for (int f = 0; f < 16; f++) decode_field<true>(words + W, H, f, 1, 4.0f, 0.0f, out + f * H);
    } else {
        const int64_t W = D * BITS / 16;
        for (int f = 0; f < 16 / BITS; f++) decode_field<false>(words, W, BITS * f, BITS, 1.0f, -CENTRE, out + f * W);
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

inline void stretch(float* x, int64_t n, float factor, float offset) {
    int64_t d = 0;
    for (; d + simd::LANES <= n; d += simd::LANES)
        simd::store(x + d, simd::load(x + d) * simd::splat(factor) + simd::splat(offset));
    for (; d < n; d++) x[d] = x[d] * factor + offset;
}

// Fields of one row, scaled on the way: by `scale[d]` and `offset[d]` per channel, or by the numbers of the group of
// `fields` fields.
template <int BITS>
void decode_scaled(const uint16_t* words, int64_t D, bool per_channel, int fields, const float* scale, const float* offset, float* out) {
    const int64_t W = D * BITS / 16;
    const int32_t mask = (1 << BITS) - 1;
    int group = 0, left = fields;
    for (int f = 0; f < 16 / BITS; f++, left--) {
        if (!left) group++, left = fields;
        const simd::vfloat group_scale = simd::splat(scale[group]), group_offset = simd::splat(offset[group]);
        for (int64_t j = 0; j < W; j += simd::LANES) {
            const simd::vfloat code = simd::to_floats((simd::load_words(words + j) >> (BITS * f)) & mask);
            const int64_t d = f * W + j;
            simd::store(out + d, per_channel ? simd::fma(code, simd::load(scale + d), simd::load(offset + d))
                                             : simd::fma(code, group_scale, group_offset));
        }
    }
}

// Rows of whole registers whose fields belong to one group: `decode_scaled` can take them.
inline bool fields_are_whole(const Plane& p, int64_t D) {
    const int64_t W = D * p.bits / 16;
    return p.bits != 3 && W % simd::LANES == 0 && (p.per_channel || D / p.n_groups % W == 0);
}

inline void decode_scaled(int64_t bits, const uint16_t* words, int64_t D, bool per_channel, int fields, const float* scale,
                          const float* offset, float* out) {
    switch (bits) {
        case 8: return decode_scaled<8>(words, D, per_channel, fields, scale, offset, out);
        case 4: return decode_scaled<4>(words, D, per_channel, fields, scale, offset, out);
        default: return decode_scaled<2>(words, D, per_channel, fields, scale, offset, out);
    }
}

// `n` scales and zero points as float32; the zero point of code 0 instead of that of the centre.
inline void widen_grid(const Rows& rows, int64_t block, int64_t n, float* scale, float* offset) {
    attention::widen(rows.scale + block * rows.plane->scale_row, 0, 1, n, scale);
    attention::widen(rows.zero + block * rows.plane->zero_row, 0, 1, n, offset);
    const float centre = float((1 << rows.plane->bits) - 1) / 2;
    for (int64_t d = 0; d < n; d++) offset[d] -= centre * scale[d];
}

// Rows `[start, start + n)` as float32 `[n, width]`. `channels` holds 2 * width floats.
inline void decode_rows(const Rows& rows, int64_t start, int n, float* out, float* channels) {
    const Plane& p = *rows.plane;
    const int64_t D = rows.D, width = attention::padded(D), group = D / p.n_groups;
    float *scale = channels, *zero = channels + width;
    int64_t current = -1;
    if (fields_are_whole(p, D)) {
        const int fields = int(group / (D * p.bits / 16));
        int64_t block = start / rows.per_scale, left = (block + 1) * rows.per_scale - start;
        for (int t = 0; t < n; t++, left--) {
            if (!left) block++, left = rows.per_scale;
            if (block != current) widen_grid(rows, block, p.per_channel ? D : p.n_groups, scale, zero);
            current = block;
            decode_scaled(p.bits, rows.codes + (start + t) * p.row, D, p.per_channel, fields, scale, zero, out + t * width);
        }
        return;
    }
    for (int t = 0; t < n; t++) {
        float* x = out + t * width;
        decode(p.bits, rows.codes + (start + t) * p.row, D, x);
        std::fill(x + D, x + width, 0.0f);
        const int64_t block = (start + t) / rows.per_scale;
        const simd::f16 *s = rows.scale + block * p.scale_row, *z = rows.zero + block * p.zero_row;
        if (!p.per_channel) {
            for (int64_t g = 0; g < p.n_groups; g++) {
                const float factor = simd::to_float(s[g]), offset = simd::to_float(z[g]);
                stretch(x + g * group, group, factor, offset);
            }
            continue;
        }
        if (block != current) {
            attention::widen(s, 0, 1, D, scale);
            attention::widen(z, 0, 1, D, zero);
            current = block;
        }
        for (int64_t d = 0; d < width; d += simd::LANES)
            simd::store(x + d, simd::load(x + d) * simd::load(scale + d) + simd::load(zero + d));
    }
}

}  // namespace packed_rows
