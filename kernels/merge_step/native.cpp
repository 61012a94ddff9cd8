// merge_step on the CPU: the weighted mean of the newest tokens of every head, a block of channels at a time in registers.
#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace {

using simd::LANES;
using simd::vfloat;

// Addresses and strides in elements; channels are adjacent.
struct Call {
    int64_t x, x_batch, x_head;
    int64_t weights, weights_batch, weights_head, weights_cell;  // float32
    int64_t segment, segment_batch, segment_head, segment_cell;
    int64_t out;  // contiguous
    int64_t dtype, segment_is_float, B, H, w, D, cell, threads;
};

constexpr int BLOCK = 4;  // registers of sums: enough to hide the latency of an addition

// What one head reads and writes.
template <class X, class Member>
struct Head {
    const X* x;
    const float* weights;
    Member* segment;
    X* out;

    Head(const Call& call, int64_t b, int64_t h)
        : x(reinterpret_cast<const X*>(call.x) + b * call.x_batch + h * call.x_head),
          weights(reinterpret_cast<const float*>(call.weights) + b * call.weights_batch + h * call.weights_head),
          segment(reinterpret_cast<Member*>(call.segment) + b * call.segment_batch + h * call.segment_head),
          out(reinterpret_cast<X*>(call.out) + (b * call.H + h) * call.D) {}
};

// Calls f(weight, member) for the cells of the open segment.
template <class X, class Member, class F>
inline void each_member(const Call& call, const Head<X, Member>& head, F f) {
    for (int64_t i = 0; i < call.w; i++) {
        const float weight = head.weights[i * call.weights_cell];
        if (weight != 0) f(weight, head.segment + i * call.segment_cell);
    }
}

// Means of channels `[d, d + N * LANES)`.
template <int N, class X, class Member>
inline void mean_of_block(const Call& call, const Head<X, Member>& head, float total, int64_t d) {
    vfloat sums[N] = {};
    each_member(call, head, [&](float weight, const Member* member) {
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) sums[i] = simd::fma(simd::splat(weight), simd::load(member + d + i * LANES), sums[i]);
    });
    float means[N * LANES];
    for (int i = 0; i < N; i++) simd::store(means + i * LANES, sums[i] / simd::splat(total));
    for (int i = 0; i < N * LANES; i++) head.out[d + i] = simd::from_float<X>(means[i]);
}

template <class X, class Member>
void step(const Call& call, const Head<X, Member>& head) {
    Member* newest = head.segment + call.cell * call.segment_cell;
    for (int64_t d = 0; d < call.D; d++) {
        if constexpr (std::is_same<X, Member>::value) {
            newest[d] = head.x[d];
        } else {
            newest[d] = simd::to_float(head.x[d]);
        }
    }
    float total = 0;
    each_member(call, head, [&](float weight, const Member*) { total += weight; });
    int64_t d = 0;
    for (; d + BLOCK * LANES <= call.D; d += BLOCK * LANES) mean_of_block<BLOCK>(call, head, total, d);
    for (; d + LANES <= call.D; d += LANES) mean_of_block<1>(call, head, total, d);
    for (; d < call.D; d++) {
        float sum = 0;
        each_member(call, head, [&](float weight, const Member* member) { sum += weight * simd::to_float(member[d]); });
        head.out[d] = simd::from_float<X>(sum / total);
    }
}

template <class X, class Member>
void run(const Call& call) {
    const int64_t heads = call.B * call.H;
    // about 20 us of work: below it waking threads costs more than it gives
    const int threads = heads * call.w * call.D < 400000 ? 1 : int(std::min<int64_t>(call.threads, heads));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < heads; i++) step(call, Head<X, Member>(call, i / call.H, i % call.H));
}

}  // namespace

extern "C" void merge_step(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    if (call.dtype == 0) {
        run<float, float>(call);
    } else if (call.dtype == 1) {
        call.segment_is_float ? run<simd::bf16, float>(call) : run<simd::bf16, simd::bf16>(call);
    } else {
        call.segment_is_float ? run<simd::f16, float>(call) : run<simd::f16, simd::f16>(call);
    }
}
