// sparse_attention on the CPU: kept channels are put in their places in registers (AVX2, AVX-512) or in L1, 32 rows at a time,
// and attended to in float32; rows are never expanded to memory.
#include "sparse_rows.h"

#if defined(__AVX2__)
#include "register_tiles.h"
#endif

namespace {

using attention::CHUNK;
using attention::State;
using sparse_rows::BLOCK;
using sparse_rows::Rows;
using sparse_rows::Side;
using sparse_rows::STEP;

struct Call {
    attention::Queries queries;
    Side k, v;
    attention::Tail tail;
};

#if defined(__AVX2__)
template <class T>
constexpr bool UNSCALED = register_tiles::unscaled<T>();
#else
template <class T>
constexpr bool UNSCALED = false;
#endif

// Expanding in registers is done again for every four queries; for more than these a way through L1 is shorter (measured).
template <class T>
int most_in_registers(const Side& side) {
    return side.plane.bits ? 4 : UNSCALED<T> ? 16 : 8;
}

// Memory of rows that are needed next, prefetched a few rows at a time.
struct Soon {
    const char* at[2] = {};
    const char* end[2] = {};
    int64_t step[2] = {};

    void add(int i, int64_t address, int64_t stride, int64_t size, int64_t n) {
        // rows with large gaps between them have gaps in time too: the memory system keeps up
        if (!address || n <= 0 || stride > 2 * size) return;
        at[i] = reinterpret_cast<const char*>(address), end[i] = at[i] + n * stride, step[i] = stride;
    }
    Soon() = default;
    Soon(const Rows& rows, int64_t element, int64_t first, int64_t stop) {
        const packed_rows::Plane& p = rows.side->plane;
        const int64_t width = p.bits ? rows.keep * p.bits / 16 : rows.keep;
        if (p.bits) element = 2;
        add(0, p.codes + (rows.b * p.batch + rows.h * p.head + first * p.row) * element, p.row * element, width * element, stop - first);
        if (rows.side->layout == sparse_rows::ALL) return;
        const int64_t size = rows.side->layout == sparse_rows::INDEX ? rows.keep : (rows.D + 7) / 8;
        add(1, reinterpret_cast<int64_t>(rows.places + first * rows.side->places_row), rows.side->places_row, size, stop - first);
    }
    void fetch(int n) {
        for (int i = 0; i < 2; i++) {
            const char* stop = std::min(end[i], at[i] + n * step[i]);
            for (; at[i] < stop; at[i] += 64) __builtin_prefetch(at[i], 0, 2);
        }
    }
};

// An item on its way through the packed rows. Expanded rows are whole blocks of channels in an order of their own:
// queries and outputs are kept in that order too.
struct Item {
    State &state, keys, values;
    float *kept, *expanded, scaling;
    alignas(64) uint64_t masks[CHUNK * sparse_rows::MAX_WORDS];

    static int64_t width(int64_t D) { return sparse_rows::blocks(D) * BLOCK; }
    static int64_t floats(const Call& call) {
        return (STEP + 2 * attention::QUERY_BLOCK) * width(call.queries.D) + sparse_rows::scratch_size(call.queries.D);
    }
    Item(State& state, int64_t D, float scaling) : state(state), keys(state), values(state), scaling(scaling) {
        keys.width = values.v_width = width(D);
        expanded = state.scratch + CHUNK * std::max(state.width, state.v_width);
        keys.q = expanded + STEP * width(D);
        values.out = keys.q + attention::QUERY_BLOCK * width(D);
        kept = values.out + attention::QUERY_BLOCK * width(D);
    }
    template <class T>
    void arrange_queries(int64_t D) {
        std::fill(keys.q, keys.q + keys.n_q * keys.width, 0.0f);
        for (int i = 0; i < keys.n_q; i++)
            for (int64_t d = 0; d < D; d++) keys.q[i * keys.width + sparse_rows::place_of<T>(d)] = state.q[i * state.width + d];
    }
    // For scores in registers, where those want the queries as they came.
    template <class T>
    void copy_queries(const attention::Queries& queries, int64_t b, int64_t h) {
        T* to = reinterpret_cast<T*>(keys.q);
        for (int i = 0; i < keys.n_q; i++, to += keys.width) {
            const int64_t g = (state.first + i) / queries.S, s = (state.first + i) % queries.S;
            const T* from = reinterpret_cast<const T*>(queries.q) + b * queries.q_batch + (h * queries.G + g) * queries.q_head + s * queries.q_row;
            std::copy(from, from + queries.D, to);
            std::fill(to + queries.D, to + keys.width, T{});
        }
    }
    template <class T>
    void restore_outputs(int64_t D) {
        for (int i = 0; i < values.n_q; i++)
            for (int64_t d = 0; d < D; d++) state.out[i * state.v_width + d] = values.out[i * values.v_width + sparse_rows::place_of<T>(d)];
    }
};

// The state with its scores from row `from` of the chunk on.
State later(State state, int from) {
    state.scores += from;
    return state;
}

// Rows that keep all channels: dense ones or codes. Calls f(rows, stride, from, n).
template <class T, class F>
void with_whole_rows(Item& item, const Rows& rows, int64_t start, int n, Soon& soon, F f) {
    const bool widen = item.state.n_q > 8 || rows.D % simd::LANES;
    for (int from = 0; from < n; from += STEP) {
        const int count = std::min(STEP, n - from);
        soon.fetch(count);
        if (rows.side->plane.bits) {
            const auto decoded = sparse_rows::decoded_values(rows, start + from, count, item.kept);
            f(decoded.first, decoded.stride, from, count);
        } else if (widen) {
            attention::widen(rows.values<T>(start + from), rows.side->plane.row, count, rows.D, item.expanded);
            f(static_cast<const float*>(item.expanded), attention::padded(rows.D), from, count);
        } else {
            f(rows.values<T>(start + from), rows.side->plane.row, from, count);
        }
    }
}

// Sparse rows by way of L1.
template <class Kept>
const float* expanded(Item& item, const Rows& rows, const Kept& kept, const uint64_t* masks, int64_t start, int n, int64_t width) {
    sparse_rows::expand_rows(rows, kept, masks, start, n, width, item.expanded);
    return item.expanded;
}

// Sparse rows: calls f(kept, masks, from, n).
template <class T, class F>
void with_sparse_rows(Item& item, const Rows& rows, int64_t start, int n, F f) {
    sparse_rows::read_masks(rows, start, n, item.masks);
    for (int from = 0; from < n; from += STEP) {
        const int count = std::min(STEP, n - from);
        sparse_rows::with_kept<T>(rows, start + from, count, item.kept,
                                  [&](const auto& kept) { f(kept, item.masks + from * rows.words, from, count); });
    }
}

template <class T>
void score(Item& item, const Rows& k, int64_t start, int n, Soon soon) {
    if (k.side->layout == sparse_rows::ALL)
        return with_whole_rows<T>(item, k, start, n, soon, [&](const auto* rows, int64_t stride, int from, int count) {
            attention::score(later(item.state, from), rows, stride, count);
        });
    with_sparse_rows<T>(item, k, start, n, [&](const auto& kept, const uint64_t* masks, int from, int count) {
        const State keys = later(item.keys, from);
#if defined(__AVX2__)
        if (keys.n_q <= most_in_registers<T>(*k.side)) return register_tiles::score(keys, kept, masks, k.words, count, item.scaling, soon);
#endif
        soon.fetch(count);
        attention::score(keys, expanded(item, k, kept, masks, start + from, count, keys.width), keys.width, count);
    });
}

template <class T>
void add_values(Item& item, const Rows& v, int64_t start, int n, Soon soon) {
    if (v.side->layout == sparse_rows::ALL)
        return with_whole_rows<T>(item, v, start, n, soon, [&](const auto* rows, int64_t stride, int from, int count) {
            attention::add_values(later(item.state, from), rows, stride, count);
        });
    with_sparse_rows<T>(item, v, start, n, [&](const auto& kept, const uint64_t* masks, int from, int count) {
        const State values = later(item.values, from);
        soon.fetch(count);
#if defined(__AVX2__)
        if (values.n_q <= most_in_registers<T>(*v.side)) return register_tiles::add_values(values, kept, masks, v.words, count);
#endif
        attention::add_values(values, expanded(item, v, kept, masks, start + from, count, values.v_width), values.v_width, count);
    });
}

// Packed rows `[start, stop)`. They come first: the outputs so far are zero.
template <class T>
void add_packed(State& state, const Call& call, int64_t b, int64_t h, int64_t start, int64_t stop) {
    const attention::Queries& queries = call.queries;
    const int64_t D = queries.D;
    const Rows k(call.k, b, h, D, call.tail.n_packed), v(call.v, b, h, D, call.tail.n_packed);
    const uint8_t* mask = attention::mask_of(queries, b, h, 0);
    Item item(state, D, float(queries.scaling));
    if (call.k.plane.bits) {
        item.arrange_queries<float>(D);
    } else if (UNSCALED<T> && state.n_q <= most_in_registers<T>(call.k)) {
        item.copy_queries<T>(queries, b, h);
    } else {
        item.arrange_queries<T>(D);
    }
    std::fill(item.values.out, item.values.out + state.n_q * item.values.v_width, 0.0f);
    State& outputs = call.v.layout == sparse_rows::ALL ? state : item.values;
    for (int64_t first = start; first < stop; first += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, stop - first));
        const int64_t next = first + n;
        score<T>(item, k, first, n, Soon(v, sizeof(T), first, next));
        attention::weigh(outputs, queries, mask ? mask + first : nullptr, n);
        add_values<T>(item, v, first, n, Soon(k, sizeof(T), next, std::min<int64_t>(stop, next + CHUNK)));
    }
    if (&outputs == &item.values) call.v.plane.bits ? item.restore_outputs<float>(D) : item.restore_outputs<T>(D);
}

}  // namespace

extern "C" void sparse_attention(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    attention::with_type(call.queries.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        attention::attend(call.queries, call.tail.all_rows(), Item::floats(call),
                          [&](State& state, int64_t b, int64_t h, int64_t start, int64_t stop) {
                              call.tail.add<T>(state, call.queries, b, h, start, stop, [&](int64_t first, int64_t last) {
                                  add_packed<T>(state, call, b, h, first, last);
                              });
                          });
    });
}
