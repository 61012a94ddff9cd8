// A square of registers, rows to columns.
#pragma once

#include "simd.h"

namespace simd {

// lanes i of a: (i & STEP) ? b[i - STEP] : a[i], and of b: (i & STEP) ? b[i] : a[i + STEP]
template <int STEP>
inline void exchange(vfloat& a, vfloat& b) {
    const vfloat x = a, y = b;
#if defined(__clang__)
    for (int i = 0; i < LANES; i++) {
        a[i] = (i & STEP) ? y[i - STEP] : x[i];
        b[i] = (i & STEP) ? y[i] : x[i + STEP];
    }
#else
    vint low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = (i & STEP) ? LANES + i - STEP : i;
        high[i] = (i & STEP) ? LANES + i : i + STEP;
    }
    a = __builtin_shuffle(x, y, low);
    b = __builtin_shuffle(x, y, high);
#endif
}

// LANES registers.
template <int STEP = 1>
inline void transpose(vfloat* v) {
    if constexpr (STEP < LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & STEP)) exchange<STEP>(v[i], v[i + STEP]);
        transpose<2 * STEP>(v);
    }
}

}  // namespace simd
