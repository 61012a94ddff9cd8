// Sparse rows of one KV head (layout: README.md of sparse_pack) and their expansion, two registers at a time.
#pragma once

#include "packed_rows.h"

namespace sparse_rows {

using attention::CHUNK;
using simd::LANES;
using simd::vfloat;

constexpr int BLOCK = 2 * LANES;            // channels that are expanded at a time
constexpr int STEP = attention::SUB_CHUNK;  // rows that are decoded or expanded at a time, to stay in L1
constexpr int MAX_WORDS = 4;                // of 64 bits, of the mask of a row: 256 channels
constexpr int64_t SLACK = 64;               // bytes that are read behind the end of a row

enum Layout : int64_t { ALL = 0, BITMAP = 1, INDEX = 2 };

struct Side {
    packed_rows::Plane plane;  // the values, or with bits > 0 their codes
    int64_t places, places_batch, places_head, places_row, layout, keep;
};

inline int64_t blocks(int64_t D) { return (D + BLOCK - 1) / BLOCK; }

// One head of one side.
struct Rows {
    const Side* side;
    packed_rows::Rows codes;
    const uint8_t* places;
    int64_t D, keep, n_rows, words, b, h;

    Rows(const Side& s, int64_t b, int64_t h, int64_t D, int64_t n_rows)
        : side(&s),
          codes(s.plane, b, h, s.keep, n_rows),
          places(reinterpret_cast<const uint8_t*>(s.places) + b * s.places_batch + h * s.places_head),
          D(D),
          keep(s.keep),
          n_rows(n_rows),
          words((D + 63) / 64),
          b(b),
          h(h) {}

    template <class T>
    const T* values(int64_t row) const {
        const packed_rows::Plane& p = side->plane;
        return reinterpret_cast<const T*>(p.codes) + b * p.batch + h * p.head + row * p.row;
    }

    // Is there memory of this head behind the row before `stop`, so that a whole register may be read there?
    bool room_behind(int64_t stop, int64_t element) const { return (n_rows - stop) * side->plane.row * element >= SLACK; }
};

// ---- places ----

// Bit c of masks[t * words + c / 64]: channel c of row start + t is kept.
inline void read_bitmaps(const Rows& rows, int64_t start, int n, uint64_t* masks) {
    const int64_t n_bytes = (rows.D + 7) / 8, stride = rows.side->places_row;
    const uint8_t* from = rows.places + start * stride;
    if (n_bytes == 16) {
        for (int t = 0; t < n; t++) std::memcpy(masks + 2 * t, from + t * stride, 16);
    } else if (n_bytes == 8) {
        for (int t = 0; t < n; t++) std::memcpy(masks + t, from + t * stride, 8);
    } else {
        for (int t = 0; t < n; t++) {
            masks[(t + 1) * rows.words - 1] = 0;
            std::memcpy(masks + t * rows.words, from + t * stride, n_bytes);
        }
    }
}

// The words of a mask with the bits `index` names.
#if defined(__GFNI__) && defined(__AVX512BW__)
// Each number is a row of 32 bits, its byte, times a column of 8, its bit; eight such products are one of 8 x 8 matrices.
template <int WORDS>
inline void set_bits(const uint8_t* index, int64_t n, uint64_t* mask) {
    const auto repeat = [](int64_t low, int64_t high) { return _mm512_broadcast_i32x4(_mm_set_epi64x(high, low)); };
    const int64_t bits = int64_t(0x8040201008040201);
    const __m512i one = _mm512_set1_epi64(bits), reversed = _mm512_set1_epi64(0x0102040810204080);
    __m512i sums[4] = {};
    for (; n > 0; index += 64, n -= 64) {
        const __mmask64 some = n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0);
        const __m512i at = _mm512_maskz_loadu_epi8(some, index);
        const __m512i bit = _mm512_maskz_shuffle_epi8(some, repeat(bits, bits), _mm512_and_si512(at, _mm512_set1_epi8(7)));
        const __m512i columns = _mm512_gf2p8affine_epi64_epi8(reversed, bit, 0);
        const __m512i byte = _mm512_and_si512(_mm512_srli_epi16(at, 3), _mm512_set1_epi8(31));
        for (int w = 0; w < WORDS; w++) {
            // byte 16 and above of either half get their top bit set, which shuffles in a zero
            const __m512i half = w < 2 ? byte : _mm512_xor_si512(byte, _mm512_set1_epi8(16));
            const __m512i near = _mm512_add_epi8(half, _mm512_set1_epi8(0x70));
            const __m512i row = _mm512_shuffle_epi8(w % 2 ? repeat(0, bits) : repeat(bits, 0), near);
            sums[w] = _mm512_xor_si512(sums[w], _mm512_gf2p8affine_epi64_epi8(_mm512_gf2p8affine_epi64_epi8(one, row, 0), columns, 0));
        }
    }
    for (int w = 0; w < WORDS; w += 2) {
        const __m512i both = _mm512_or_si512(_mm512_unpacklo_epi64(sums[w], sums[w + 1]), _mm512_unpackhi_epi64(sums[w], sums[w + 1]));
        const __m256i four = _mm256_or_si256(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
        const __m128i two = _mm_or_si128(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
        std::memcpy(mask + w, &two, w + 1 < WORDS ? 16 : 8);
    }
}
#else
template <int WORDS>
inline void set_bits(const uint8_t* index, int64_t n, uint64_t* mask) {
    uint64_t words[WORDS] = {};
    int64_t i = 0;
    // a shift by 64 or more, or by less than 0, leaves nothing: each word picks its own channels
#if defined(__AVX512F__)
    __m512i sums[WORDS];
    for (int w = 0; w < WORDS; w++) sums[w] = _mm512_setzero_si512();
    for (; i + 8 <= n; i += 8) {
        const __m512i at = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index + i)));
        for (int w = 0; w < WORDS; w++)
            sums[w] = _mm512_or_si512(sums[w], _mm512_sllv_epi64(_mm512_set1_epi64(1), _mm512_sub_epi64(at, _mm512_set1_epi64(64 * w))));
    }
    for (int w = 0; w < WORDS; w++) words[w] = uint64_t(_mm512_reduce_or_epi64(sums[w]));
#elif defined(__AVX2__)
    __m256i sums[WORDS];
    for (int w = 0; w < WORDS; w++) sums[w] = _mm256_setzero_si256();
    for (; i + 4 <= n; i += 4) {
        int32_t four;
        std::memcpy(&four, index + i, 4);
        const __m256i at = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        for (int w = 0; w < WORDS; w++)
            sums[w] = _mm256_or_si256(sums[w], _mm256_sllv_epi64(_mm256_set1_epi64x(1), _mm256_sub_epi64(at, _mm256_set1_epi64x(64 * w))));
    }
    for (int w = 0; w < WORDS; w++) {
        const __m128i half = _mm_or_si128(_mm256_castsi256_si128(sums[w]), _mm256_extracti128_si256(sums[w], 1));
        words[w] = uint64_t(_mm_cvtsi128_si64(half)) | uint64_t(_mm_extract_epi64(half, 1));
    }
#endif
    for (; i < n; i++) words[index[i] / 64 % WORDS] |= uint64_t(1) << index[i] % 64;
    std::memcpy(mask, words, sizeof words);
}
#endif

inline void read_masks(const Rows& rows, int64_t start, int n, uint64_t* masks) {
    if (rows.side->layout == BITMAP) return read_bitmaps(rows, start, n, masks);
#if defined(__AVX2__)
    const uint8_t* from = rows.places + start * rows.side->places_row;
    const auto each = [&](auto words) {
        constexpr int WORDS = decltype(words)::value;
        for (int t = 0; t < n; t++) set_bits<WORDS>(from + t * rows.side->places_row, rows.keep, masks + t * WORDS);
    };
    switch (rows.words) {
        case 1: return each(std::integral_constant<int, 1>());
        case 2: return each(std::integral_constant<int, 2>());
        case 3: return each(std::integral_constant<int, 3>());
        default: return each(std::integral_constant<int, 4>());
    }
#endif
}

inline uint32_t block_mask(const uint64_t* mask, int64_t block) {
    uint32_t bits = 0;
    std::memcpy(&bits, reinterpret_cast<const char*>(mask) + block * (BLOCK / 8), BLOCK / 8);
    return bits;
}

// ---- values ----

// Rows of kept channels, SLACK readable bytes behind the last of them.
template <class T>
struct Kept {
    const T* first;
    int64_t stride;
};

// `scratch` holds scratch_size() floats.
inline int64_t scratch_size(int64_t keep) { return STEP * attention::padded(keep) + SLACK / 4; }

template <class T>
inline Kept<T> kept_values(const Rows& rows, int64_t start, int n, float* scratch) {
    const Kept<T> there = {rows.values<T>(start), rows.side->plane.row};
    if (rows.room_behind(start + n, sizeof(T))) return there;
    T* copy = reinterpret_cast<T*>(scratch);
    for (int t = 0; t < n; t++) std::memcpy(copy + t * rows.keep, there.first + t * there.stride, rows.keep * sizeof(T));
    return {copy, rows.keep};
}

// Do the fields of a word belong to one group each?
inline bool whole_fields(const packed_rows::Plane& p, int64_t keep) {
    return p.bits != 3 && keep / p.n_groups % (keep * p.bits / 16) == 0;
}

// Scales and offsets of `n` rows, [n, groups] each, as float32; the offset is what code 0 stands for.
inline void read_grid(const Rows& rows, int64_t start, int n, float* scale, float* offset) {
    const packed_rows::Plane& p = rows.side->plane;
    const int64_t n_groups = p.n_groups, width = attention::padded(n_groups * n);
    const simd::f16 *s = rows.codes.scale + start * p.scale_row, *z = rows.codes.zero + start * p.zero_row;
    const int n_together = p.scale_row == n_groups && p.zero_row == n_groups ? n : 1;
    for (int t = 0; t < n; t += n_together) {
        attention::widen(s + t * p.scale_row, 0, 1, n_together * n_groups, scale + t * n_groups);
        attention::widen(z + t * p.zero_row, 0, 1, n_together * n_groups, offset + t * n_groups);
    }
    const vfloat centre = simd::splat(float((1 << p.bits) - 1) / 2);
    for (int64_t i = 0; i < width; i += LANES) simd::store(offset + i, simd::load(offset + i) - centre * simd::load(scale + i));
}

inline Kept<float> decoded_values(const Rows& rows, int64_t start, int n, float* scratch) {
    const packed_rows::Plane& p = rows.side->plane;
    const int64_t keep = rows.keep, stride = attention::padded(keep);
    // a group holds whole fields, of which there are at most 8
    constexpr int MAX_GROUPS = 8;
    alignas(64) float scale[STEP * MAX_GROUPS + LANES], offset[STEP * MAX_GROUPS + LANES];
    if (!whole_fields(p, keep) || !rows.room_behind(start + n, 2)) {
        alignas(64) float channels[2 * 256];
        packed_rows::decode_rows(rows.codes, start, n, scratch, channels);
        return {scratch, stride};
    }
    read_grid(rows, start, n, scale, offset);
    const int fields = int(keep / p.n_groups / (keep * p.bits / 16));
    const auto decode = [&](auto bits) {
        for (int t = 0; t < n; t++)
            packed_rows::decode_scaled<decltype(bits)::value>(rows.codes.codes + (start + t) * p.row, keep, false, fields,
                                                              scale + t * p.n_groups, offset + t * p.n_groups, scratch + t * stride);
    };
    switch (p.bits) {
        case 8: decode(std::integral_constant<int, 8>()); break;
        case 4: decode(std::integral_constant<int, 4>()); break;
        default: decode(std::integral_constant<int, 2>());
    }
    // whole registers were written; rows that are not expanded are read up to there
    if (rows.side->layout == ALL)
        for (int t = 0; t < n; t++) std::fill(scratch + t * stride + keep, scratch + (t + 1) * stride, 0.0f);
    return {scratch, stride};
}

// Calls f with the kept channels of rows `[start, start + n)`, in the type T of the queries or decoded to float32.
template <class T, class F>
inline void with_kept(const Rows& rows, int64_t start, int n, float* scratch, F f) {
    if (rows.side->plane.bits) {
        f(decoded_values(rows, start, n, scratch));
    } else {
        f(kept_values<T>(rows, start, n, scratch));
    }
}

// ---- expansion ----

// Even channels of a block before the odd ones: they part by a shift and a mask, without a shuffle.
template <class T>
constexpr bool even_first() {
#if defined(__AVX512VBMI2__)
    return std::is_same_v<T, simd::bf16>;
#else
    return false;
#endif
}

// Place of channel `d` in rows expanded from values of type T.
template <class T>
constexpr int64_t place_of(int64_t d) {
    return even_first<T>() ? d / BLOCK * BLOCK + d % 2 * (BLOCK / 2) + d % BLOCK / 2 : d;
}

#if defined(__AVX512F__)
inline void expand(const float* values, uint32_t mask, vfloat* x) {
    x[0] = _mm512_maskz_expand_ps(__mmask16(mask), _mm512_loadu_ps(values));
    x[1] = _mm512_maskz_expand_ps(__mmask16(mask >> 16), _mm512_loadu_ps(values + __builtin_popcount(mask & 0xffff)));
}
#if defined(__AVX512VBMI2__)
inline __m512i expand_words(const void* values, uint32_t mask) {
    __m512i x = _mm512_loadu_si512(values);
    // a load by itself: compilers would merge it, and from memory `vpexpandw` is microcode on some CPUs
    asm("" : "+v"(x));
    return _mm512_maskz_expand_epi16(mask, x);
}

inline void expand(const simd::bf16* values, uint32_t mask, vfloat* x) {
    const __m512i words = expand_words(values, mask);
    x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    x[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
}
inline void expand(const simd::f16* values, uint32_t mask, vfloat* x) {
    const __m512i words = expand_words(values, mask);
    x[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
    x[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
}
#else
template <class T>
inline void expand(const T* values, uint32_t mask, vfloat* x) {
    x[0] = _mm512_maskz_expand_ps(__mmask16(mask), simd::load(values));
    x[1] = _mm512_maskz_expand_ps(__mmask16(mask >> 16), simd::load(values + __builtin_popcount(mask & 0xffff)));
}
#endif
#elif defined(__AVX2__)
// For each mask of 8 channels: where a kept channel comes from, -1 where zero belongs.
struct Sources {
    alignas(64) int8_t bf16[256][32] = {};  // bytes that make float32 of bfloat16, as `pshufb` wants them
    alignas(64) int8_t f16[256][16] = {};   // bytes of 16-bit values
    alignas(64) int8_t floats[256][8] = {};

    constexpr Sources() {
        for (int mask = 0; mask < 256; mask++)
            for (int c = 0, n = 0; c < 8; c++) {
                const bool kept = mask >> c & 1;
                floats[mask][c] = int8_t(kept ? n : -1);
                for (int byte = 0; byte < 2; byte++) {
                    const int8_t from = int8_t(kept ? 2 * n + byte : -1);
                    f16[mask][2 * c + byte] = from;
                    bf16[mask][4 * c + byte] = -1, bf16[mask][4 * c + 2 + byte] = from;
                }
                n += kept;
            }
    }
};
constexpr Sources SOURCES;

inline vfloat expand_eight(const float* values, uint32_t mask) {
    const __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(SOURCES.floats[mask])));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(values), from), _mm256_setzero_ps(), _mm256_castsi256_ps(from));
}
inline vfloat expand_eight(const simd::bf16* values, uint32_t mask) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256(reinterpret_cast<const __m256i*>(SOURCES.bf16[mask]))));
}
inline vfloat expand_eight(const simd::f16* values, uint32_t mask) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(words, _mm_load_si128(reinterpret_cast<const __m128i*>(SOURCES.f16[mask]))));
}
template <class T>
inline void expand(const T* values, uint32_t mask, vfloat* x) {
    x[0] = expand_eight(values, mask & 255);
    x[1] = expand_eight(values + __builtin_popcount(mask & 255), mask >> 8);
}
#endif

#if defined(__AVX2__)
// `n` rows as float32 `[n, width]`, channels in the places of `place_of`; width is a whole number of blocks.
template <class T>
inline void expand_rows(const Rows& rows, const Kept<T>& kept, const uint64_t* masks, int64_t, int n, int64_t width, float* out) {
    for (int t = 0; t < n; t++) {
        const T* at = kept.first + t * kept.stride;
        for (int64_t block = 0; block < width / BLOCK; block++) {
            const uint32_t mask = block_mask(masks + t * rows.words, block);
            vfloat x[2];
            expand(at, mask, x);
            at += __builtin_popcount(mask);
            simd::store(out + t * width + block * BLOCK, x[0]);
            simd::store(out + t * width + block * BLOCK + LANES, x[1]);
        }
    }
}

#else
// Channel numbers of the set bits of each byte.
struct Channels {
    uint8_t of[256][8] = {}, count[256] = {};

    constexpr Channels() {
        for (int mask = 0; mask < 256; mask++)
            for (int c = 0; c < 8; c++)
                if (mask >> c & 1) of[mask][count[mask]++] = uint8_t(c);
    }
};
constexpr Channels CHANNELS;

// The channel numbers of a mask; up to 8 bytes are written behind them.
inline void list_channels(const uint64_t* mask, int64_t words, uint8_t* index) {
    for (int64_t byte = 0; byte < 8 * words; byte++) {
        const uint8_t bits = uint8_t(mask[byte / 8] >> byte % 8 * 8);
        uint64_t eight;
        std::memcpy(&eight, CHANNELS.of[bits], 8);
        eight += uint64_t(byte) * 0x0808080808080808;
        std::memcpy(index, &eight, 8);
        index += CHANNELS.count[bits];
    }
}

// Value by value: without a shuffle of bytes nothing is faster.
template <class T>
inline void expand_rows(const Rows& rows, const Kept<T>& kept, const uint64_t* masks, int64_t start, int n, int64_t width, float* out) {
    std::fill(out, out + n * width, 0.0f);
    for (int t = 0; t < n; t++) {
        const T* values = kept.first + t * kept.stride;
        uint8_t list[64 * MAX_WORDS + 8];
        const uint8_t* index = list;
        if (rows.side->layout == INDEX) {
            index = rows.places + (start + t) * rows.side->places_row;
        } else {
            list_channels(masks + t * rows.words, rows.words, list);
        }
        float* row = out + t * width;
#pragma GCC unroll 4
        for (int64_t i = 0; i < rows.keep; i++) row[index[i]] = simd::to_float(values[i]);
    }
}
#endif

}  // namespace sparse_rows
