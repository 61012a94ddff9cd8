// The micro-kernel of the matrix products: a few rows times a block of columns, sums in registers.
// Factors are float32 or, where the CPU multiplies pairs of them, bfloat16.
#pragma once

#include "attention.h"

namespace products {

using simd::LANES;
using simd::vfloat;

template <class X>
struct Factor;

template <>
struct Factor<float> {
    static constexpr int DEPTH = 1;  // inner channels of one step
    using Vector = vfloat;
    static Vector load(const float* p) { return simd::load(p); }
    static Vector spread(const float* p) { return simd::splat(*p); }
    static vfloat add(vfloat sum, Vector x, Vector y) { return simd::fma(x, y, sum); }
};

#if defined(__AVX512BF16__)
// Pairs of inner channels side by side; the products are exact in float32.
template <>
struct Factor<simd::bf16> {
    static constexpr int DEPTH = 2;
    using Vector = __m512bh;
    static Vector load(const simd::bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vector spread(const simd::bf16* p) {
        int32_t pair;
        std::memcpy(&pair, p, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static vfloat add(vfloat sum, Vector x, Vector y) { return _mm512_dpbf16_ps(sum, x, y); }
};
#endif

// What latents in T are multiplied as.
#if defined(__AVX512BF16__)
template <class T>
using FactorOf = std::conditional_t<std::is_same_v<T, simd::bf16>, simd::bf16, float>;
#else
template <class T>
using FactorOf = float;
#endif

// sums += rows `a` times C registers of columns, which `columns(step, x)` puts into x.
template <int M, int C, class X, class Columns>
inline __attribute__((always_inline)) void multiply(const X* const* a, int64_t steps, Columns columns,
                                                    vfloat (*sums)[C]) {
    using F = Factor<X>;
    for (int64_t step = 0; step < steps; step++) {
        typename F::Vector x[C];
        columns(step, x);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const typename F::Vector y = F::spread(a[m] + step * F::DEPTH);
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) sums[m][c] = F::add(sums[m][c], x[c], y);
        }
    }
}

}  // namespace products
