// sparse_attention on the CPU: the packed rows of sparse_item.h, then a dense tail.
#include "sparse_item.h"

namespace {

using attention::CHUNK;
using attention::State;
using sparse_item::Item;
using sparse_rows::Rows;
using sparse_rows::Side;

struct Call {
    attention::Queries queries;
    Side k, v;
    attention::Tail tail;
};

// Memory of rows that are needed next, prefetched a few rows at a time.
struct Prefetch {
    const char* at[2] = {};
    const char* end[2] = {};
    int64_t step[2] = {};

    void add(int i, int64_t address, int64_t stride, int64_t size, int64_t n) {
        // rows with large gaps between them have gaps in time too: the memory system keeps up
        if (!address || n <= 0 || stride > 2 * size) return;
        at[i] = reinterpret_cast<const char*>(address), end[i] = at[i] + n * stride, step[i] = stride;
    }
    Prefetch() = default;
    Prefetch(const Rows& rows, int64_t element, int64_t first, int64_t stop) {
        const packed_rows::Plane& p = rows.side->plane;
        const int64_t width = p.bits ? rows.keep * p.bits / 16 : rows.keep;
        if (p.bits) element = 2;
        add(0, p.codes + (rows.b * p.batch + rows.h * p.head + first * p.row) * element, p.row * element, width * element, stop - first);
        if (rows.side->layout == sparse_rows::ALL) return;
        const int64_t size = rows.side->layout == sparse_rows::INDEX ? rows.keep : (rows.D + 7) / 8;
        add(1, reinterpret_cast<int64_t>(rows.places + first * rows.side->places_row), rows.side->places_row, size, stop - first);
    }
    void fetch(int, int n) {
        for (int i = 0; i < 2; i++) {
            const char* stop = std::min(end[i], at[i] + n * step[i]);
            for (; at[i] < stop; at[i] += 64) __builtin_prefetch(at[i], 0, 2);
        }
    }
};

// Packed rows `[start, stop)`. They come first: the outputs so far are zero.
template <class T>
void add_packed(State& state, const Call& call, int64_t b, int64_t h, int64_t start, int64_t stop) {
    const attention::Queries& queries = call.queries;
    const Rows k(call.k, b, h, queries.D, call.tail.n_packed), v(call.v, b, h, queries.Dv, call.tail.n_packed);
    const uint8_t* mask = attention::mask_of(queries, b, h, 0);
    Item item(state, queries);
    item.begin<T>(queries, call.k, call.v, b, h);
    for (int64_t first = start; first < stop; first += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, stop - first));
        const int64_t next = first + n;
        Prefetch values_ahead(v, sizeof(T), first, next), keys_ahead(k, sizeof(T), next, std::min<int64_t>(stop, next + CHUNK));
        sparse_item::score<T>(item, k, first, n, 0, values_ahead);
        attention::weigh(item.outputs(call.v), queries, mask ? mask + first : nullptr, n);
        sparse_item::add_values<T>(item, v, first, n, 0, keys_ahead);
    }
    item.end<T>(call.v, queries.Dv);
}

}  // namespace

extern "C" void sparse_attention(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    attention::with_type(call.queries.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        attention::attend(call.queries, call.tail.all_rows(), Item::floats(call.queries),
                          [&](State& state, int64_t b, int64_t h, int64_t start, int64_t stop) {
                              call.tail.add<T>(state, call.queries, b, h, start, stop, [&](int64_t first, int64_t last) {
                                  add_packed<T>(state, call, b, h, first, last);
                              });
                          });
    });
}
