// sparse_pack on the CPU, bit for bit what the reference computes: the bit patterns of magnitudes are integers in the
// same order, so the smallest magnitude that stays is found by bisection, with a count per step.
#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace {

constexpr int MAX_CHANNELS = 256, ALIGNED = 64;  // bytes of the widest register
constexpr int ITEM = 64;                         // rows of one item of work
constexpr int64_t BITMAP = 1;
constexpr int SMALL_GROUP = 8;                   // channels whose ranks are counted one by one

struct Call {
    int64_t x, batch, head, row;  // address, strides in elements
    int64_t weight, weight_batch, weight_head, weight_row;
    int64_t values, places;  // contiguous
    int64_t size, weight_type;  // bytes of an element of x, type of the weights
    int64_t B, H, n, D, keep, layout, group, threads;
};

// Magnitudes as integers: signed ones, which every instruction set compares; the sign bit is free.
template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
    typedef int32_t type;
    static constexpr type NAN_ = 0x7f800001;
};
template <>
struct Magnitude<simd::bf16> {
    typedef int16_t type;
    static constexpr type NAN_ = 0x7f81;
};
template <>
struct Magnitude<simd::f16> {
    typedef int16_t type;
    static constexpr type NAN_ = 0x7c01;
};

template <class M>
struct Row {
    static constexpr int LANES = simd::LANES * 4 / sizeof(M);
    typedef M vector __attribute__((vector_size(LANES * sizeof(M))));

    // behind the last channel: -1, which is smaller than any magnitude
    alignas(ALIGNED) M magnitude[MAX_CHANNELS + ALIGNED];
    alignas(ALIGNED) uint8_t kept[MAX_CHANNELS + 8];
};

// How many of n magnitudes are at least `limit`. Reads up to a whole register.
template <class M>
inline int count(const M* magnitude, int n, M limit) {
    typedef typename Row<M>::vector vector;
    constexpr int LANES = Row<M>::LANES;
    const vector bound = limit - vector{};
    int total = 0;
#if defined(__AVX512BW__)
    for (int d = 0; d < n; d += LANES) {
        const __m512i x = _mm512_loadu_si512(magnitude + d);
        if constexpr (sizeof(M) == 2) {
            total += __builtin_popcount(_mm512_cmpge_epi16_mask(x, (__m512i)bound));
        } else {
            total += __builtin_popcount(_mm512_cmpge_epi32_mask(x, (__m512i)bound));
        }
    }
#else
    vector sums = {};
    for (int d = 0; d < n; d += LANES) {
        vector x;
        std::memcpy(&x, magnitude + d, sizeof x);
        sums -= x >= bound;
    }
    for (int i = 0; i < LANES; i++) total += sums[i];
#endif
    return total;
}

// kept[d] = 1 for the `keep` largest of n magnitudes, ties to the lower channel. Behind the n there are none (-1).
template <class M>
void choose(const M* magnitude, int n, int keep, M largest, uint8_t* kept) {
    // the limit is the largest number that at least `keep` magnitudes reach
    M low = 0, high = largest;
    int reached = n;
    while (low < high && reached != keep) {
        const M middle = M(high - (high - low) / 2);
        const int found = count(magnitude, n, middle);
        if (found >= keep) {
            low = middle, reached = found;
        } else {
            high = M(middle - 1);
        }
    }
    for (int d = 0; d < n; d++) kept[d] = magnitude[d] >= low;
    // too many only where magnitudes are equal to the limit: the highest channels of those go
    for (int d = n - 1; reached > keep; d--)
        if (magnitude[d] == low) kept[d] = 0, reached--;
}

// The same for every group of `group` channels, by rank.
template <class M>
void choose_by_rank(const M* magnitude, int D, int group, int keep, uint8_t* kept) {
    for (int first = 0; first < D; first += group)
        for (int d = 0; d < group; d++) {
            const M* m = magnitude + first;
            int rank = 0;
            for (int j = 0; j < d; j++) rank += m[j] >= m[d];
            for (int j = d + 1; j < group; j++) rank += m[j] > m[d];
            kept[first + d] = rank < keep;
        }
}

template <class T>
inline void read_magnitudes(const T* weight, int D, typename Magnitude<T>::type* magnitude) {
    typedef typename Magnitude<T>::type M;
    constexpr M LARGEST = Magnitude<T>::NAN_, NO_SIGN = std::numeric_limits<M>::max();
    for (int d = 0; d < D; d++) {
        M bits;
        std::memcpy(&bits, weight + d, sizeof bits);
        magnitude[d] = std::min(LARGEST, M(bits & NO_SIGN));
    }
}

// X: an element of x as an integer. T: the type of the weights.
template <class X, class T>
void pack_rows(const Call& call, int64_t bh, int64_t start, int64_t stop) {
    typedef typename Magnitude<T>::type M;
    const int D = int(call.D), keep = int(call.keep), group = int(call.group), per_group = keep * group / D;
    const int64_t b = bh / call.H, h = bh % call.H, n_bytes = (D + 7) / 8;
    const X* x = reinterpret_cast<const X*>(call.x) + b * call.batch + h * call.head;
    const T* weight = reinterpret_cast<const T*>(call.weight) + b * call.weight_batch + h * call.weight_head;
    Row<M> row;
    std::fill(row.magnitude, row.magnitude + MAX_CHANNELS + ALIGNED, M(-1));
    alignas(ALIGNED) M one_group[MAX_CHANNELS + ALIGNED];
    std::fill(one_group, one_group + MAX_CHANNELS + ALIGNED, M(-1));
    std::fill(row.kept, row.kept + MAX_CHANNELS + 8, 0);
    for (int64_t t = start; t < stop; t++) {
        read_magnitudes(weight + t * call.weight_row, D, row.magnitude);
        if (group == D) {
            choose(row.magnitude, D, keep, Magnitude<T>::NAN_, row.kept);
        } else if (group <= SMALL_GROUP) {
            choose_by_rank(row.magnitude, D, group, per_group, row.kept);
        } else {
            for (int first = 0; first < D; first += group) {
                std::copy(row.magnitude + first, row.magnitude + first + group, one_group);
                choose(one_group, group, per_group, Magnitude<T>::NAN_, row.kept + first);
            }
        }
        const X* from = x + t * call.row;
        X* values = reinterpret_cast<X*>(call.values) + (bh * call.n + t) * keep;
        uint8_t* places = reinterpret_cast<uint8_t*>(call.places) + (bh * call.n + t) * (call.layout == BITMAP ? n_bytes : keep);
        for (int byte = 0; byte < n_bytes; byte++) {
            uint64_t flags;
            std::memcpy(&flags, row.kept + 8 * byte, 8);
            // bit 8j of the flags lands on bit 56 + j of the product
            uint32_t bits = uint32_t(flags * 0x0102040810204080 >> 56);
            if (call.layout == BITMAP) places[byte] = uint8_t(bits);
            for (; bits; bits &= bits - 1) {
                const int d = 8 * byte + __builtin_ctz(bits);
                *values++ = from[d];
                if (call.layout != BITMAP) *places++ = uint8_t(d);
            }
        }
    }
}

template <class X, class T>
void run(const Call& call) {
    const int64_t per_head = (call.n + ITEM - 1) / ITEM, items = call.B * call.H * per_head;
    // about 20 us of work: below it waking threads costs more than it gives
    const int threads = call.B * call.H * call.n * call.D < 20000 ? 1 : int(std::min<int64_t>(call.threads, items));
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < items; item++) {
        const int64_t start = item % per_head * ITEM;
        pack_rows<X, T>(call, item / per_head, start, std::min(call.n, start + ITEM));
    }
}

template <class X>
void run_weights(const Call& call) {
    switch (call.weight_type) {
        case 1: return run<X, simd::bf16>(call);
        case 2: return run<X, simd::f16>(call);
        default: return run<X, float>(call);
    }
}

}  // namespace

extern "C" void sparse_pack(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    call.size == 2 ? run_weights<uint16_t>(call) : run_weights<uint32_t>(call);
}
