// A thin layer over the vector unit: one register of floats, its loads, and the few functions attention needs.
// The width follows the flags the file is compiled with (16 lanes AVX-512, 8 AVX2, 4 elsewhere).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504f;

// storage types of the operands; the arithmetic is always float
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ---- one element ----

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    // infinity and NaN keep their payload; everything else is exact after one multiplication
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    if (x != x) return {uint16_t((u >> 16) | 0x40)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
#if defined(__F16C__)
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#else
    const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    // adding 0.5 aligns a subnormal half to the low mantissa bits and rounds it to nearest even
    if (rest < 0x38800000) return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
#endif
}

// ---- one register ----

inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(int32_t x) { return x - vint{}; }

inline vfloat load(const float* p) {
    vfloat v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

inline vfloat load(const bf16* p) {
#if defined(__AVX512F__)
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
#elif defined(__AVX2__)
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
#else
    typedef uint16_t words __attribute__((vector_size(LANES * 2)));
    words w;
    std::memcpy(&w, p, sizeof w);
    return bit_cast<vfloat>(__builtin_convertvector(w, vint) << 16);
#endif
}

inline vfloat load(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vfloat v;
    for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
    return v;
#endif
}

inline vint load_words(const uint16_t* p) {
#if defined(__AVX512F__)
    return bit_cast<vint>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return bit_cast<vint>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    vint v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
inline vfloat to_floats(vint v) { return __builtin_convertvector(v, vfloat); }

inline void store(f16* p, vfloat v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; i++) p[i] = from_float<f16>(v[i]);
#endif
}

// the low 16 bits of each lane
inline void store_low_halves(uint16_t* p, vint v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#else
    for (int i = 0; i < LANES; i++) p[i] = uint16_t(v[i]);
#endif
}

inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// both return b where a comparison with NaN is involved, like the x86 instructions
inline vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
inline vfloat min(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

inline vfloat select(vint condition, vfloat yes, vfloat no) {
    return bit_cast<vfloat>((bit_cast<vint>(yes) & condition) | (bit_cast<vint>(no) & ~condition));
}

// lanes i of the result: (i & STEP) ? b[i] + b[i ^ STEP] : a[i] + a[i ^ STEP]
template <int STEP, class V>
inline V add_neighbours(V a, V b) {
    vint stay, cross;
    for (int i = 0; i < LANES; i++) {
        const int from = (i & STEP) ? LANES : 0;
        stay[i] = from + i;
        cross[i] = from + (i ^ STEP);
    }
#if defined(__clang__)
    V x, y;
    for (int i = 0; i < LANES; i++) {
        x[i] = (i & STEP) ? b[i] : a[i];
        y[i] = (i & STEP) ? b[i ^ STEP] : a[i ^ STEP];
    }
    return x + y;
#else
    return __builtin_shuffle(a, b, stay) + __builtin_shuffle(a, b, cross);
#endif
}

// pairwise sums of COUNT registers, then of half as many with twice the step, until one is left
template <int COUNT, int STEP, class V>
inline V sum_pairs(const V* v) {
    if constexpr (COUNT == 1) {
        return v[0];
    } else {
        V halved[COUNT / 2];
#pragma GCC unroll 16
        for (int i = 0; i < COUNT / 2; i++) halved[i] = add_neighbours<STEP>(v[2 * i], v[2 * i + 1]);
        return sum_pairs<COUNT / 2, 2 * STEP>(halved);
    }
}

// LANES registers to one: lane i holds the sum of v[i]
template <class V>
inline V sum_each(const V* v) {
    return sum_pairs<LANES, 1>(v);
}

inline float sum(vfloat v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}
inline float largest(vfloat v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// exp to 1.5 ulp; exp(-inf) = 0 and NaN stays NaN
inline vfloat exp(vfloat x) {
    const vfloat ln2_high = splat(0.693359375f), ln2_low = splat(-2.12194440e-4f), magic = splat(0x1.8p23f);
    // x is the second operand: a NaN survives the clamp
    const vfloat y = min(splat(88.7f), max(splat(-110.0f), x));
    const vfloat shifted = fma(y, splat(LOG2_E), magic);
    const vfloat n = shifted - magic;
    vfloat r = fma(n, -ln2_high, y);
    r = fma(n, -ln2_low, r);
    vfloat p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    // two steps, since 2^n itself may be subnormal
    const vint whole = bit_cast<vint>(shifted) - bit_cast<vint>(magic), half = whole >> 1;
    const vfloat first = bit_cast<vfloat>((half + 127) << 23), second = bit_cast<vfloat>((whole - half + 127) << 23);
    return p * first * second;
}

// 2^x to 2 ulp for x <= 127; 2^-inf = 0 and NaN stays NaN
inline vfloat exp2(vfloat x) {
#if defined(__AVX512F__)
    const vfloat n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // where x is -inf the difference is NaN: the polynomial is not looked at
    const vfloat r = _mm512_mask_sub_ps(vfloat{}, _mm512_cmp_ps_mask(x, splat(-INF), _CMP_NEQ_UQ), x, n);
    vfloat p = splat(1.5353362e-4f);
    p = fma(p, r, splat(1.3398874e-3f));
    p = fma(p, r, splat(9.6184373e-3f));
    p = fma(p, r, splat(5.5503324e-2f));
    p = fma(p, r, splat(2.4022648e-1f));
    p = fma(p, r, splat(6.9314720e-1f));
    return _mm512_scalef_ps(fma(p, r, splat(1.0f)), n);
#else
    return exp(x * splat(0.69314718f));
#endif
}

inline vfloat tanh(vfloat x) {
    const vfloat square = x * x, magnitude = bit_cast<vfloat>(bit_cast<vint>(x) & 0x7fffffff);
    // near zero 1 - 2 / (e^2x + 1) cancels: use the Taylor series there
    vfloat series = splat(62.0f / 2835.0f);
    series = fma(series, square, splat(-17.0f / 315.0f));
    series = fma(series, square, splat(2.0f / 15.0f));
    series = fma(series, square, splat(-1.0f / 3.0f));
    series = fma(series * square, x, x);
    const vfloat far = splat(1.0f) - splat(2.0f) / (exp(min(splat(40.0f), x + x)) + splat(1.0f));
    return select(magnitude < splat(0.25f), series, far);
}

}  // namespace simd
