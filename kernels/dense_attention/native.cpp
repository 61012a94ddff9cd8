// dense_attention on the CPU: keys and values are read once, in their own type; the arithmetic is float32.
#include "attention.h"

namespace {

struct Call {
    attention::Queries queries;
    int64_t k, k_batch, k_head, k_row, v, v_batch, v_head, v_row, n_rows;
};

}  // namespace

extern "C" void dense_attention(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    const attention::Queries& queries = call.queries;
    attention::with_type(queries.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *k = reinterpret_cast<const T*>(call.k), *v = reinterpret_cast<const T*>(call.v);
        attention::attend(queries, call.n_rows, 0, [&](attention::State& state, int64_t b, int64_t h, int64_t start, int64_t stop) {
            attention::add_dense(state, queries, k + b * call.k_batch + h * call.k_head + start * call.k_row, call.k_row,
                                 v + b * call.v_batch + h * call.v_head + start * call.v_row, call.v_row,
                                 attention::mask_of(queries, b, h, start), stop - start);
        });
    });
}
