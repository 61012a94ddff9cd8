// slot_step on the CPU: a few integers per head, as in the reference.
#include <cstdint>
#include <cstring>

namespace {

// Addresses and strides in elements.
struct Call {
    int64_t alpha, alpha_batch, alpha_head;        // bool
    int64_t is_real, is_real_batch;                // bool; address 0: all are
    int64_t pending, pending_batch, pending_head;           // int32
    int64_t lengths, lengths_batch, lengths_head;  // int32
    int64_t slot;                                  // int32, contiguous
    int64_t before, cell;                          // of the token before and of this one, from the first cell of a ring
    int64_t B, H;
};

// The row of a token, -1 for padding; `before` and `cell` are the same with a ring of one cell.
inline int32_t take(bool alpha, bool is_real, int32_t& before, int32_t& cell, int32_t& length) {
    if (alpha && is_real && before >= 0) before |= 1;
    const bool is_free = cell >= 0 && cell % 2 == 1;
    if (!is_real) {
        if (!is_free) cell = -1;
        return -1;
    }
    const int32_t row = is_free ? cell / 2 : length++;
    cell = 2 * row;
    return row;
}

}  // namespace

extern "C" void slot_step(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    const bool* is_real = reinterpret_cast<const bool*>(call.is_real);
    for (int64_t b = 0; b < call.B; b++) {
        const bool here = is_real == nullptr || is_real[b * call.is_real_batch];
        for (int64_t h = 0; h < call.H; h++) {
            const bool alpha = reinterpret_cast<const bool*>(call.alpha)[b * call.alpha_batch + h * call.alpha_head];
            int32_t* pending = reinterpret_cast<int32_t*>(call.pending) + b * call.pending_batch + h * call.pending_head;
            int32_t& length = reinterpret_cast<int32_t*>(call.lengths)[b * call.lengths_batch + h * call.lengths_head];
            int32_t& slot = reinterpret_cast<int32_t*>(call.slot)[b * call.H + h];
            slot = take(alpha, here, pending[call.before], pending[call.cell], length);
        }
    }
}
