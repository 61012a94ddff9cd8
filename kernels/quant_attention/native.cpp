// quant_attention on the CPU: packed rows are decoded chunk by chunk into L1/L2 and attended to in float32.
// With AVX-512 VNNI the usual formats skip the decoding: integer_rows.h.
#include "packed_rows.h"

#if defined(__AVX512VNNI__)
#include "integer_rows.h"
#endif

namespace {

using attention::CHUNK;
using attention::State;
using packed_rows::Plane;
using packed_rows::Rows;

struct Call {
    attention::Queries queries;
    Plane k, v;
    attention::Tail tail;
};

constexpr int STEP = 32;  // decoded rows: they stay in L1 until they are used

// Packed rows `[start, stop)` by way of float32.
void add_decoded(State& state, const attention::Queries& queries, const Rows& k, const Rows& v, const uint8_t* mask,
                 int64_t start, int64_t stop) {
    float* channels = state.scratch + CHUNK * std::max(state.width, state.v_width);
    for (int64_t first = start; first < stop; first += STEP) {
        const int n = int(std::min<int64_t>(STEP, stop - first));
        packed_rows::decode_rows(k, first, n, state.scratch, channels);
        attention::score(state, state.scratch, state.width, n);
        attention::weigh(state, queries, mask ? mask + first : nullptr, n);
        packed_rows::decode_rows(v, first, n, state.scratch, channels);
        attention::add_values(state, state.scratch, state.v_width, n);
    }
}

void add_packed(State& state, const Call& call, int64_t b, int64_t h, int64_t start, int64_t stop) {
    const attention::Queries& queries = call.queries;
    const Rows k(call.k, b, h, queries.D, call.tail.n_packed), v(call.v, b, h, queries.Dv, call.tail.n_packed);
    const uint8_t* mask = attention::mask_of(queries, b, h, 0);
#if defined(__AVX512VNNI__)
    if (integer_rows::keys_suit(k) && integer_rows::values_suit(v)) return integer_rows::add(state, queries, k, v, mask, start, stop);
#endif
    add_decoded(state, queries, k, v, mask, start, stop);
}

}  // namespace

extern "C" void quant_attention(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    const int64_t extra = 2 * attention::padded(std::max(call.queries.D, call.queries.Dv)) + 2 * attention::LANES;
    attention::with_type(call.queries.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        attention::attend(call.queries, call.tail.all_rows(), extra, [&](State& state, int64_t b, int64_t h, int64_t start, int64_t stop) {
            call.tail.add<T>(state, call.queries, b, h, start, stop,
                             [&](int64_t first, int64_t last) { add_packed(state, call, b, h, first, last); });
        });
    });
}
