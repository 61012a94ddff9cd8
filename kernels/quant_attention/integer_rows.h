// Attention on the packed codes themselves, in integers (AVX-512 VNNI).
//
// Queries times their key scales, and softmax weights times their value scales, become fixed-point numbers cut into
// signed bytes ("limbs"); `dpbusd` multiplies codes by them. Offsets and zero points are added in float32.
// Two limbs carry 15 bits of the largest number of a block, three carry 23: enough for 16-bit and 32-bit queries.
#pragma once

#include "packed_rows.h"

namespace integer_rows {

using attention::CHUNK;
using attention::State;
using packed_rows::Rows;

constexpr int BLOCK = 32;      // rows of a key scale, and of one step of the scores
constexpr int MAX_D = 256;     // 255 * 32512 * 256 fits 31 bits
constexpr int MAX_LIMBS = 3;
constexpr int HEADS = 4;       // queries that share one unpacking

inline float largest_fixed(int limbs) { return limbs == 2 ? 32512.0f : 8323072.0f; }

// Bytes hold 8 / BITS codes. Of the words `j` of a row, bytes 2j hold field i of each and bytes 2j + 1 field i + FIELDS.
template <int BITS>
struct Layout {
    static constexpr int FIELDS = 8 / BITS;
    static constexpr float CENTRE = ((1 << BITS) - 1) / 2.0f;

    template <int I>
    static __m512i field(__m512i bytes) {
        if constexpr (BITS == 8) return bytes;
        const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
        return _mm512_and_si512(I ? _mm512_srli_epi16(bytes, BITS * I) : bytes, mask);
    }
};

inline bool formats_suit(const packed_rows::Plane& p, int64_t D) {
    return p.bits != 3 && D <= MAX_D && D * p.bits % 128 == 0 && p.row == D * p.bits / 16;
}

inline bool keys_suit(const Rows& k) {
    return (k.plane->per_channel ? k.per_scale == BLOCK : k.plane->n_groups == 1) && formats_suit(*k.plane, k.D);
}

inline bool values_suit(const Rows& v) {
    // a field of a word must belong to one group
    const int64_t groups = v.plane->n_groups, W = v.D * v.plane->bits / 16;
    return (groups == 1 || (v.D / groups) % W == 0) && formats_suit(*v.plane, v.D);
}

// ---- fixed-point numbers ----

// The limbs of 16 numbers x * factor, lowest first, 16 bytes each, `stride` bytes apart; returns the rounded numbers.
template <int LIMBS>
inline __m512i cut(__m512 x, __m512 factor, int8_t* to, int64_t stride) {
    const __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
    __m512i rest = fixed;
    for (int l = 0; l < LIMBS; l++) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + l * stride), _mm512_cvtepi32_epi8(rest));
        // the byte below is signed: carry its sign into the next one
        rest = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
    }
    return fixed;
}

// ---- helpers of the values ----

// Bytes of four rows side by side, so that one dword holds a byte position of four tokens: 16 bytes of each row, a
// unit, make one register. Calls emit(unit, quad, register); `position` tells which byte of the row a lane is.
template <class Emit>
inline void interleave(const uint8_t* rows, int64_t row_bytes, int n_quads, Emit emit) {
    for (int quad = 0; quad < n_quads; quad++) {
        const uint8_t* row = rows + quad * 4 * row_bytes;
        int64_t byte = 0;
        for (; byte + 64 <= row_bytes; byte += 64) {
            __m512i x[4];
            for (int t = 0; t < 4; t++) x[t] = _mm512_loadu_si512(row + t * row_bytes + byte);
            const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
            const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
            emit(byte / 16, quad, _mm512_unpacklo_epi16(a, c));
            emit(byte / 16 + 1, quad, _mm512_unpackhi_epi16(a, c));
            emit(byte / 16 + 2, quad, _mm512_unpacklo_epi16(b, d));
            emit(byte / 16 + 3, quad, _mm512_unpackhi_epi16(b, d));
        }
        for (; byte < row_bytes; byte += 16) {
            __m128i x[4];
            for (int t = 0; t < 4; t++) x[t] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + t * row_bytes + byte));
            const __m128i a = _mm_unpacklo_epi8(x[0], x[1]), b = _mm_unpackhi_epi8(x[0], x[1]);
            const __m128i c = _mm_unpacklo_epi8(x[2], x[3]), d = _mm_unpackhi_epi8(x[2], x[3]);
            const __m256i low = _mm256_set_m128i(_mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(a, c));
            const __m256i high = _mm256_set_m128i(_mm_unpackhi_epi16(b, d), _mm_unpacklo_epi16(b, d));
            emit(byte / 16, quad, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
        }
    }
}

// Byte of the row in lane `lane` of unit `unit` of `interleave`.
inline int64_t position(int64_t unit, int lane, int64_t row_bytes) {
    if ((unit / 4 + 1) * 64 <= row_bytes) return unit / 4 * 64 + lane / 4 * 16 + unit % 4 * 4 + lane % 4;
    return unit * 16 + lane;
}

// One query, one group of channels: limbs of p * scale, `stride` bytes apart.
template <int LIMBS>
inline void weigh_group(const float* p, const float* scale, const float* zero, int n, float centre, int8_t* limbs,
                        int64_t stride, float& unit, float& offset) {
    alignas(64) float scaled[CHUNK];
    __m512 top = _mm512_setzero_ps(), zeros = top;
    for (int t = 0; t < n; t += 16) {
        const __m512 x = _mm512_loadu_ps(p + t), y = _mm512_mul_ps(x, _mm512_load_ps(scale + t));
        zeros = _mm512_fmadd_ps(x, _mm512_load_ps(zero + t), zeros);
        _mm512_store_ps(scaled + t, y);
        top = _mm512_max_ps(top, y);
    }
    unit = std::max(_mm512_reduce_max_ps(top), 1e-30f) / largest_fixed(LIMBS);
    const __m512 factor = _mm512_set1_ps(1.0f / unit);
    __m512i total = _mm512_setzero_si512();
    for (int t = 0; t < n; t += 16) total = _mm512_add_epi32(total, cut<LIMBS>(_mm512_load_ps(scaled + t), factor, limbs + t, stride));
    offset = _mm512_reduce_add_ps(zeros) - unit * centre * float(_mm512_reduce_add_epi32(total));
}

// ---- scores ----

// HEADS queries of one block of rows. score = unit * dot + offset; sum of the query itself for zero points per token.
struct Queries {
    // [query][limb][vector of a row][field], 64 bytes each, in the byte order of packed rows
    alignas(64) int8_t bytes[HEADS][MAX_LIMBS][MAX_D];
    alignas(64) float unit[16], offset[16], sum[16];
};

// Rows of 16 or 32 bytes share a register.
inline int rows_per_vector(int64_t row_bytes) { return row_bytes == 16 ? 4 : row_bytes == 32 ? 2 : 1; }

// Lanes 0..3: the sums over a, b, c, d. The other lanes repeat them.
template <class V>
inline V sum_four(const V* v) {
    V x = simd::sum_pairs<4, 1>(v);
    const __m512i bits = simd::bit_cast<__m512i>(x);
    x += simd::bit_cast<V>(_mm512_shuffle_i64x2(bits, bits, 0xb1));
    const __m512i twice = simd::bit_cast<__m512i>(x);
    return x + simd::bit_cast<V>(_mm512_shuffle_i64x2(twice, twice, 0x4e));
}

// The same for maxima of numbers that are not negative.
inline __m512 max_four(const __m512* v) {
    const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512 x = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
}

// 32 integers to 16 bits each.
inline __m512i narrow(__m512i low, __m512i high) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(low, high));
}

// Numbers of the 32 words from `x` on, `n_words` of a row of W, fixed at `factor`. Short rows are repeated.
struct Fixed {
    __m512i low, high;

    Fixed(const float* x, int64_t n_words, int64_t W, __m512 factor) {
        const auto fix = [&](__m512 y) { return _mm512_cvtps_epi32(_mm512_mul_ps(y, factor)); };
        const auto some = [](int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1 << std::max<int64_t>(n, 0)) - 1); };
        if (W == 8) {
            low = high = fix(_mm512_broadcast_f32x8(_mm256_loadu_ps(x)));
        } else if (W == 16) {
            low = high = fix(_mm512_loadu_ps(x));
        } else {
            low = fix(_mm512_maskz_loadu_ps(some(n_words), x)), high = fix(_mm512_maskz_loadu_ps(some(n_words - 16), x + 16));
        }
    }
};

// Bytes of two fields side by side: the low bytes of both, or the high ones.
inline __m512i low_bytes(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, _mm512_slli_epi16(odd, 8));
}
inline __m512i high_bytes(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(even, 8), odd);
}

// One query `x`, already times the key scales, to limbs; returns 16 partial sums of the fixed numbers, each counted
// as often as the row is repeated.
template <int BITS, int LIMBS>
inline __m512i arrange(const float* x, int64_t D, __m512 factor, int8_t (*bytes)[MAX_D]) {
    constexpr int FIELDS = Layout<BITS>::FIELDS;
    const int64_t W = D * BITS / 16;
    const __m512i ones = _mm512_set1_epi16(1), carry = _mm512_set1_epi16(128);
    __m512i total = _mm512_setzero_si512();
    int64_t at = 0;
    for (int64_t word = 0; word < W; word += 32)
        for (int i = 0; i < FIELDS; i++, at += 64) {
            Fixed even(x + i * W + word, W - word, W, factor), odd(x + (i + FIELDS) * W + word, W - word, W, factor);
            if constexpr (LIMBS == 3) {
                total = _mm512_add_epi32(total, _mm512_add_epi32(_mm512_add_epi32(even.low, even.high), _mm512_add_epi32(odd.low, odd.high)));
                const __m512i byte = _mm512_set1_epi32(255), half = _mm512_set1_epi32(128);
                const auto low = [&](const Fixed& f) { return narrow(_mm512_and_si512(f.low, byte), _mm512_and_si512(f.high, byte)); };
                _mm512_store_si512(bytes[0] + at, low_bytes(low(even), low(odd)));
                // the byte below is signed: carry its sign into the next one
                for (__m512i* f : {&even.low, &even.high, &odd.low, &odd.high}) *f = _mm512_srai_epi32(_mm512_add_epi32(*f, half), 8);
            }
            const __m512i a = narrow(even.low, even.high), b = narrow(odd.low, odd.high);
            if constexpr (LIMBS == 2) total = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(total, a, ones), b, ones);
            _mm512_store_si512(bytes[LIMBS - 2] + at, low_bytes(a, b));
            _mm512_store_si512(bytes[LIMBS - 1] + at, high_bytes(_mm512_add_epi16(a, carry), _mm512_add_epi16(b, carry)));
        }
    return total;
}

// `count` queries times the scales of a block to limbs. Without scales they are 1 and `zero` is ignored.
template <int BITS, int LIMBS>
inline void prepare(const float* q, int64_t width, int count, const float* scale, const float* zero, int64_t D, Queries& queries) {
    alignas(64) float scaled[HEADS][MAX_D + 32];
    __m512 tops[HEADS];
    simd::vfloat dots[HEADS], sums[HEADS];
    simd::vint totals[HEADS];
    for (int g = 0; g < HEADS; g++) {
        __m512 top = _mm512_setzero_ps(), dot = top, sum = top;
        for (int64_t d = 0; d < (g < count ? D : 0); d += 16) {
            const __m512 x = _mm512_loadu_ps(q + g * width + d);
            const __m512 y = scale ? _mm512_mul_ps(x, _mm512_load_ps(scale + d)) : x;
            if (scale) dot = _mm512_fmadd_ps(x, _mm512_load_ps(zero + d), dot);
            sum = _mm512_add_ps(sum, x);
            _mm512_store_ps(scaled[g] + d, y);
            top = _mm512_max_ps(top, _mm512_abs_ps(y));
        }
        tops[g] = top, dots[g] = dot, sums[g] = sum;
    }
    // a floor keeps the factor finite when all is zero
    const __m512 unit = _mm512_mul_ps(_mm512_max_ps(max_four(tops), _mm512_set1_ps(1e-30f)), _mm512_set1_ps(1.0f / largest_fixed(LIMBS)));
    const __m512 factors = _mm512_div_ps(_mm512_set1_ps(1.0f), unit);
    for (int g = 0; g < HEADS; g++) {
        const __m512 factor = _mm512_permutexvar_ps(_mm512_set1_epi32(g), factors);
        totals[g] = simd::vint{};
        if (g < count) totals[g] = simd::bit_cast<simd::vint>(arrange<BITS, LIMBS>(scaled[g], D, factor, queries.bytes[g]));
    }
    const __m512 total = _mm512_cvtepi32_ps(simd::bit_cast<__m512i>(sum_four(totals)));
    const float repeats = float(rows_per_vector(D * BITS / 8));
    const __m512 centre = _mm512_mul_ps(unit, _mm512_set1_ps(-Layout<BITS>::CENTRE / repeats));
    _mm512_store_ps(queries.unit, unit);
    _mm512_store_ps(queries.offset, _mm512_fmadd_ps(total, centre, sum_four(dots)));
    _mm512_store_ps(queries.sum, sum_four(sums));
}

// Dot products of Q queries with COUNT registers of rows, not yet summed over lanes.
template <int Q, int COUNT, int BITS, int LIMBS, class V>
inline void multiply(const uint8_t* rows, int64_t vector_step, int64_t row_bytes, const Queries& queries, int first, V* sums) {
    using L = Layout<BITS>;
    __m512i dots[Q][COUNT][LIMBS];
#pragma GCC unroll 16
    for (int g = 0; g < Q; g++)
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
            for (int l = 0; l < LIMBS; l++) dots[g][r][l] = _mm512_setzero_si512();
    int at = 0;
    for (int64_t byte = 0; byte < row_bytes; byte += 64) {
        // the last register of a row may be partly filled
        const __mmask16 dwords = row_bytes - byte >= 64 ? 0xffff : (1u << ((row_bytes - byte) / 4)) - 1;
        __m512i packed[COUNT];
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; r++) packed[r] = _mm512_maskz_loadu_epi32(dwords, rows + r * vector_step + byte);
        const auto take = [&](auto index) {
            constexpr int I = decltype(index)::value;
            if constexpr (I < L::FIELDS) {
                __m512i x[COUNT];
#pragma GCC unroll 16
                for (int r = 0; r < COUNT; r++) x[r] = L::template field<I>(packed[r]);
#pragma GCC unroll 16
                for (int g = 0; g < Q; g++)
#pragma GCC unroll 4
                    for (int l = 0; l < LIMBS; l++) {
                        const __m512i y = _mm512_load_si512(queries.bytes[first + g][l] + at);
#pragma GCC unroll 16
                        for (int r = 0; r < COUNT; r++) dots[g][r][l] = _mm512_dpbusd_epi32(dots[g][r][l], x[r], y);
                    }
                at += 64;
            }
        };
        take(std::integral_constant<int, 0>());
        take(std::integral_constant<int, 1>());
        take(std::integral_constant<int, 2>());
        take(std::integral_constant<int, 3>());
    }
#pragma GCC unroll 16
    for (int g = 0; g < Q; g++)
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; r++) {
            const __m512i* d = dots[g][r];
            const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(d[LIMBS - 1], 8), d[LIMBS - 2]);
            if constexpr (LIMBS == 3) {
                sums[g * COUNT + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(d[0]));
            } else {
                sums[g * COUNT + r] = simd::bit_cast<V>(high);
            }
        }
}

// Scores of 16 / Q rows for the Q queries from `first` on. SHARED rows lie in each register.
template <int Q, int SHARED, int BITS, int LIMBS>
inline void score_tile(const uint8_t* rows, int64_t row_bytes, const Queries& queries, int first, const float* scale, const float* zero, float* scores) {
    constexpr int T = 16 / Q, VECTORS = T / SHARED, TOGETHER = std::min(VECTORS, 8 / Q), PARTS = VECTORS / TOGETHER;
    using V = std::conditional_t<LIMBS == 3, simd::vfloat, simd::vint>;
    V sums[Q * VECTORS];
    // part by part: the accumulators of all limbs fit the registers
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
        V some[Q * TOGETHER];
        multiply<Q, TOGETHER, BITS, LIMBS>(rows + part * TOGETHER * SHARED * row_bytes, SHARED * row_bytes,
                                           SHARED == 1 ? row_bytes : 64, queries, first, some);
#pragma GCC unroll 16
        for (int g = 0; g < Q; g++)
#pragma GCC unroll 16
            for (int r = 0; r < TOGETHER; r++) sums[g * VECTORS + part * TOGETHER + r] = some[g * TOGETHER + r];
    }
    __m512i from, query;
    for (int i = 0; i < 16; i++) {
        const int g = i / T, t = i % T;
        // lanes after the sums: row within the register, query, register
        reinterpret_cast<int32_t*>(&from)[i] = t % SHARED * (16 / SHARED) + g * VECTORS + t / SHARED;
        reinterpret_cast<int32_t*>(&query)[i] = first + g;
    }
    const V lanes = simd::sum_pairs<Q * VECTORS, 1>(sums);
    const auto spread = [&](const float* x) { return _mm512_permutexvar_ps(query, _mm512_load_ps(x)); };
    __m512 dot;
    if constexpr (LIMBS == 3) {
        dot = _mm512_permutexvar_ps(from, lanes);
    } else {
        dot = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(from, simd::bit_cast<__m512i>(lanes)));
    }
    __m512 score = _mm512_fmadd_ps(dot, spread(queries.unit), spread(queries.offset));
    if (scale) {
        const auto repeat = [](const float* x) {
            if constexpr (T == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
            if constexpr (T == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
            return _mm512_loadu_ps(x);
        };
        score = _mm512_fmadd_ps(score, repeat(scale), _mm512_mul_ps(repeat(zero), spread(queries.sum)));
    }
    alignas(64) float flat[16];
    _mm512_store_ps(flat, score);
    for (int g = 0; g < Q; g++) std::memcpy(scores + g * CHUNK, flat + g * T, T * sizeof(float));
}

// `n` rows, a multiple of 16, for `n_q` queries, 4, 2 or 1 at a time.
template <int BITS, int LIMBS>
inline void score_block(const uint8_t* rows, int64_t row_bytes, const Queries& queries, int n_q, const float* scale,
                        const float* zero, int n, float* scores) {
    const auto run = [&](auto q, auto shared, int first) {
        constexpr int Q = decltype(q)::value, SHARED = decltype(shared)::value;
        for (int t = 0; t < n; t += 16 / Q)
            score_tile<Q, SHARED, BITS, LIMBS>(rows + t * row_bytes, row_bytes, queries, first, scale ? scale + t : nullptr,
                                               zero + t, scores + first * CHUNK + t);
    };
    const auto pick = [&](auto q, int first) {
        switch (rows_per_vector(row_bytes)) {
            case 4: return run(q, std::integral_constant<int, 4>(), first);
            case 2: return run(q, std::integral_constant<int, 2>(), first);
            default: return run(q, std::integral_constant<int, 1>(), first);
        }
    };
    if (n_q == 4) return pick(std::integral_constant<int, 4>(), 0);
    if (n_q >= 2) pick(std::integral_constant<int, 2>(), 0);
    if (n_q % 2) pick(std::integral_constant<int, 1>(), n_q - 1);
}

// Rows copied to a zeroed block where fewer than a whole one are left.
inline const uint8_t* whole_block(const uint8_t* rows, int64_t row_bytes, int n, int wanted, uint8_t* copy) {
    if (n >= wanted) return rows;
    std::memset(copy, 0, wanted * row_bytes);
    std::memcpy(copy, rows, n * row_bytes);
    return copy;
}

// All queries of an item, for keys with scales per token.
struct Prepared {
    Queries blocks[attention::QUERY_BLOCK / HEADS];
};

template <int BITS, int LIMBS>
void prepare_all(const State& state, int64_t D, Prepared& prepared) {
    for (int first = 0; first < state.n_q; first += HEADS)
        prepare<BITS, LIMBS>(state.q + first * state.width, state.width, std::min(HEADS, state.n_q - first), nullptr, nullptr, D,
                             prepared.blocks[first / HEADS]);
}

// Without `prepared` the scales are per channel. `ahead` as in attention.h.
template <int BITS, int LIMBS, class Ahead>
void score(const State& state, const Rows& k, int64_t start, int n, const Prepared* prepared, Ahead& ahead) {
    const int64_t row_bytes = k.D * BITS / 8;
    alignas(64) float scale[MAX_D], zero[MAX_D];
    alignas(64) uint8_t copy[BLOCK * MAX_D];
    Queries queries;
    for (int t = 0; t < n; t += BLOCK) {
        const int n_block = int(std::min<int64_t>(BLOCK, attention::padded(n - t)));
        const auto* rows = reinterpret_cast<const uint8_t*>(k.codes + (start + t) * k.plane->row);
        const uint8_t* block = whole_block(rows, row_bytes, n - t, n_block, copy);
        ahead.fetch(t, n_block);
        if (!prepared) {
            attention::widen(k.scale + (start + t) / BLOCK * k.plane->scale_row, 0, 1, k.D, scale);
            attention::widen(k.zero + (start + t) / BLOCK * k.plane->zero_row, 0, 1, k.D, zero);
        } else {
            for (int i = 0; i < n_block; i++) {
                scale[i] = i < n - t ? simd::to_float(k.scale[(start + t + i) * k.plane->scale_row]) : 0.0f;
                zero[i] = i < n - t ? simd::to_float(k.zero[(start + t + i) * k.plane->zero_row]) : 0.0f;
            }
        }
        for (int first = 0; first < state.n_q; first += HEADS) {
            const int count = std::min(HEADS, state.n_q - first);
            float* scores = state.scores + first * CHUNK + t;
            if (prepared) {
                score_block<BITS, LIMBS>(block, row_bytes, prepared->blocks[first / HEADS], count, scale, zero, n_block, scores);
                continue;
            }
            prepare<BITS, LIMBS>(state.q + first * state.width, state.width, count, scale, zero, k.D, queries);
            score_block<BITS, LIMBS>(block, row_bytes, queries, count, nullptr, zero, n_block, scores);
        }
    }
}

// ---- values ----

// Channel order while only packed rows are added: register by register of (unit, field). Back to the natural one:
template <int BITS>
void restore_channels(const State& state, int64_t D) {
    constexpr int FIELDS = Layout<BITS>::FIELDS;
    const int64_t row_bytes = D * BITS / 8, W = row_bytes / 2;
    int channel[MAX_D];
    for (int64_t unit = 0; unit < row_bytes / 16; unit++)
        for (int i = 0; i < FIELDS; i++)
            for (int lane = 0; lane < 16; lane++) {
                const int64_t byte = position(unit, lane, row_bytes);
                channel[(unit * FIELDS + i) * 16 + lane] = int(byte / 2 + (i + byte % 2 * FIELDS) * W);
            }
    float natural[MAX_D];
    for (int q = 0; q < state.n_q; q++) {
        float* out = state.out + q * state.v_width;
        for (int64_t d = 0; d < D; d++) natural[channel[d]] = out[d];
        std::memcpy(out, natural, D * sizeof(float));
    }
}

// Softmax weights of HEADS queries times value scales, as limbs. A pattern is what one field index needs: eight bytes
// per four tokens, four for the group of even bytes and four for the group of odd bytes.
struct Weights {
    static constexpr int MAX_PATTERNS = 4;
    alignas(64) int8_t bytes[HEADS][MAX_LIMBS][MAX_PATTERNS][CHUNK * 2];
    // out += unit * dot + offset, for even and odd bytes
    float unit[HEADS][MAX_PATTERNS][2], offset[HEADS][MAX_PATTERNS][2];
};

// Dwords of two groups alternate.
inline void zip(const int8_t* even, const int8_t* odd, int n, int8_t* out) {
    for (int t = 0; t < n; t += 16) {
        const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(even + t)), b = _mm_load_si128(reinterpret_cast<const __m128i*>(odd + t));
        _mm_store_si128(reinterpret_cast<__m128i*>(out + 2 * t), _mm_unpacklo_epi32(a, b));
        _mm_store_si128(reinterpret_cast<__m128i*>(out + 2 * t + 16), _mm_unpackhi_epi32(a, b));
    }
}

// Numbers of `n` rows, `row` apart, as float32, groups CHUNK apart; zeros up to a whole register.
inline void widen_groups(const simd::f16* from, int64_t row, int64_t n_groups, int n, float* to) {
    if (row != n_groups) {
        for (int64_t g = 0; g < n_groups; g++)
            for (int t = 0; t < attention::padded(n); t++) to[g * CHUNK + t] = t < n ? simd::to_float(from[t * row + g]) : 0.0f;
        return;
    }
    if (n_groups == 1) return attention::widen(from, 0, 1, n, to);
    alignas(64) float together[16 * CHUNK];
    attention::widen(from, 0, 1, n * n_groups, together);
    std::fill(together + n * n_groups, together + attention::padded(n) * n_groups, 0.0f);
    const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int(n_groups)));
    for (int64_t g = 0; g < n_groups; g++)
        for (int t = 0; t < n; t += 16)
            _mm512_store_ps(to + g * CHUNK + t, _mm512_i32gather_ps(rows, together + t * n_groups + g, 4));
}

template <int BITS, int LIMBS>
inline void weigh(const float* p, const float* scale, const float* zero, int64_t n_groups, int n, int g, Weights& weights) {
    constexpr int FIELDS = Layout<BITS>::FIELDS;
    constexpr float CENTRE = Layout<BITS>::CENTRE;
    alignas(64) int8_t limbs[16][MAX_LIMBS][CHUNK];
    float unit[16], offset[16];
    for (int64_t group = 0; group < n_groups; group++)
        weigh_group<LIMBS>(p, scale + group * CHUNK, zero + group * CHUNK, n, CENTRE, limbs[group][0], CHUNK, unit[group], offset[group]);
    const int n_patterns = n_groups == 1 ? 1 : FIELDS;
    for (int i = 0; i < n_patterns; i++) {
        const int64_t even = i * n_groups / (2 * FIELDS), odd = (i + FIELDS) * n_groups / (2 * FIELDS);
        for (int l = 0; l < LIMBS; l++) zip(limbs[even][l], limbs[odd][l], n, weights.bytes[g][l][i]);
        weights.unit[g][i][0] = unit[even], weights.unit[g][i][1] = unit[odd];
        weights.offset[g][i][0] = offset[even], weights.offset[g][i][1] = offset[odd];
    }
}

inline __m512i broadcast8(const void* p) {
    int64_t x;
    std::memcpy(&x, p, 8);
    return _mm512_set1_epi64(x);
}

// Fields FIRST .. FIRST + COUNT of one unit, for Q queries. ONE: all fields share a pattern.
template <int Q, int BITS, int LIMBS, int FIRST, int COUNT, bool ONE>
inline void add_unit(const uint8_t* packed, int n_quads, const Weights& weights, int first, float* out, int64_t width) {
    __m512i dots[COUNT][Q][LIMBS];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
        for (int g = 0; g < Q; g++)
#pragma GCC unroll 4
            for (int l = 0; l < LIMBS; l++) dots[i][g][l] = _mm512_setzero_si512();
    for (int quad = 0; quad < n_quads; quad++) {
        const __m512i bytes = _mm512_load_si512(packed + quad * 64);
        __m512i x[COUNT];
        x[0] = Layout<BITS>::template field<FIRST>(bytes);
        if constexpr (COUNT == 2) x[1] = Layout<BITS>::template field<FIRST + 1>(bytes);
#pragma GCC unroll 4
        for (int g = 0; g < Q; g++)
#pragma GCC unroll 4
            for (int l = 0; l < LIMBS; l++)
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; i++) {
                    const __m512i y = broadcast8(weights.bytes[first + g][l][ONE ? 0 : FIRST + i] + quad * 8);
                    dots[i][g][l] = _mm512_dpbusd_epi32(dots[i][g][l], x[i], y);
                }
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
        for (int g = 0; g < Q; g++) {
            const int pattern = ONE ? 0 : FIRST + i;
            const __m512i* d = dots[i][g];
            const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(d[LIMBS - 1], 8), d[LIMBS - 2]);
            __m512 sum = _mm512_cvtepi32_ps(high);
            if constexpr (LIMBS == 3) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(d[0]));
            float* to = out + g * width + (FIRST + i) * 16;
            const __m512 unit = _mm512_castsi512_ps(broadcast8(weights.unit[first + g][pattern]));
            const __m512 offset = _mm512_castsi512_ps(broadcast8(weights.offset[first + g][pattern]));
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_fmadd_ps(sum, unit, offset)));
        }
}

template <int BITS, int LIMBS>
inline void add_units(const uint8_t* packed, int64_t n_units, int n_quads, const Weights& weights, int count, bool one, float* out, int64_t width) {
    constexpr int FIELDS = Layout<BITS>::FIELDS, PER_PASS = std::min(FIELDS, 2);
    const auto run = [&](auto q, auto same, int first) {
        constexpr int Q = decltype(q)::value;
        constexpr bool ONE = decltype(same)::value;
        for (int64_t unit = 0; unit < n_units; unit++) {
            const uint8_t* from = packed + unit * n_quads * 64;
            float* to = out + first * width + unit * FIELDS * 16;
            add_unit<Q, BITS, LIMBS, 0, PER_PASS, ONE>(from, n_quads, weights, first, to, width);
            if constexpr (FIELDS == 4) add_unit<Q, BITS, LIMBS, 2, 2, ONE>(from, n_quads, weights, first, to, width);
        }
    };
    const auto pick = [&](auto q, int first) { one ? run(q, std::true_type(), first) : run(q, std::false_type(), first); };
    for (int first = 0; first < count;) {
        const int left = count - first;
        if (left >= 4) {
            pick(std::integral_constant<int, 4>(), first), first += 4;
        } else if (left >= 2) {
            pick(std::integral_constant<int, 2>(), first), first += 2;
        } else {
            pick(std::integral_constant<int, 1>(), first), first += 1;
        }
    }
}

// Values of a chunk of `n` rows as `add_units` wants them. They may come in parts that begin at multiples of 16.
struct Values {
    // weights and scales past the end are zero
    int n, n_quads;
    uint8_t* packed;
    alignas(64) float scale[16 * CHUNK], zero[16 * CHUNK];

    Values(const State& state, int n) : n(n), n_quads((n + 3) / 4), packed(reinterpret_cast<uint8_t*>(state.scratch)) {}

    // Rows `[start, start + count)` become those from `at` on.
    template <int BITS>
    void read(const Rows& v, int64_t start, int count, int at) {
        alignas(64) uint8_t copy[CHUNK * MAX_D];
        const packed_rows::Plane& p = *v.plane;
        const int64_t row_bytes = v.D * BITS / 8;
        const int quads = (count + 3) / 4;
        const auto* rows = reinterpret_cast<const uint8_t*>(v.codes + start * p.row);
        if (count % 4) rows = whole_block(rows, row_bytes, count, quads * 4, copy);
        widen_groups(v.scale + start * p.scale_row, p.scale_row, p.n_groups, count, scale + at);
        widen_groups(v.zero + start * p.zero_row, p.zero_row, p.n_groups, count, zero + at);
        interleave(rows, row_bytes, quads, [&](int64_t unit, int quad, __m512i x) {
            _mm512_store_si512(packed + (unit * n_quads + at / 4 + quad) * 64, x);
        });
    }

    template <int BITS, int LIMBS>
    void add(const State& state, const Rows& v) const {
        const int64_t n_units = v.D * BITS / 128, n_groups = v.plane->n_groups;
        Weights weights;
        for (int first = 0; first < state.n_q; first += HEADS) {
            const int count = std::min(HEADS, state.n_q - first);
            for (int g = 0; g < count; g++)
                weigh<BITS, LIMBS>(state.scores + (first + g) * CHUNK, scale, zero, n_groups, n, g, weights);
            add_units<BITS, LIMBS>(packed, n_units, n_quads, weights, count, n_groups == 1, state.out + first * state.v_width, state.v_width);
        }
    }
};

// ---- both ----

// Calls f(bits, limbs) with what the codes and the type of the queries need, as constants.
template <class F>
void with_format(const packed_rows::Plane& p, const attention::Queries& queries, F f) {
    const auto pick = [&](auto limbs) {
        switch (p.bits) {
            case 8: return f(std::integral_constant<int, 8>(), limbs);
            case 4: return f(std::integral_constant<int, 4>(), limbs);
            default: return f(std::integral_constant<int, 2>(), limbs);
        }
    };
    if (queries.dtype == attention::FLOAT32) return pick(std::integral_constant<int, 3>());
    pick(std::integral_constant<int, 2>());
}

inline void prepare_all(const State& state, const attention::Queries& queries, const packed_rows::Plane& p, Prepared& prepared) {
    with_format(p, queries, [&](auto bits, auto limbs) {
        prepare_all<decltype(bits)::value, decltype(limbs)::value>(state, queries.D, prepared);
    });
}

inline void restore_channels(const State& state, const packed_rows::Plane& p, int64_t D) {
    switch (p.bits) {
        case 8: return restore_channels<8>(state, D);
        case 4: return restore_channels<4>(state, D);
        default: return restore_channels<2>(state, D);
    }
}

// Packed rows `[start, stop)`. They come first: `state.out` is still zero, so its channel order is free.
inline void add(State& state, const attention::Queries& queries, const Rows& k, const Rows& v, const uint8_t* mask,
                int64_t start, int64_t stop) {
    Prepared prepared;
    const Prepared* once = k.plane->per_channel ? nullptr : &prepared;
    if (once) prepare_all(state, queries, *k.plane, prepared);
    const auto rows_ahead = [&](const Rows& rows, int64_t first) {
        return attention::Ahead::rows(rows.codes + first * rows.plane->row, rows.plane->row, rows.plane->row,
                                      std::clamp<int64_t>(stop - first, 0, CHUNK));
    };
    for (int64_t first = start; first < stop; first += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, stop - first));
        const auto values_ahead = rows_ahead(v, first), keys_ahead = rows_ahead(k, first + CHUNK);
        with_format(*k.plane, queries, [&](auto bits, auto limbs) {
            score<decltype(bits)::value, decltype(limbs)::value>(state, k, first, n, once, values_ahead);
        });
        attention::weigh(state, queries, mask ? mask + first : nullptr, n);
        keys_ahead.fetch(0, CHUNK);
        Values values(state, n);
        with_format(*v.plane, queries, [&](auto bits, auto limbs) {
            values.read<decltype(bits)::value>(v, first, n, 0);
            values.add<decltype(bits)::value, decltype(limbs)::value>(state, v);
        });
    }
    restore_channels(state, *v.plane, v.D);
}

}  // namespace integer_rows
