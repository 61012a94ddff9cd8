// Attention over a chunk of rows of any format on the CPU: kept channels are put in their places in registers (AVX2, AVX-512)
// or in L1, 32 rows at a time, and attended to in float32; rows are never expanded to memory.
#pragma once

#include "sparse_rows.h"

#if defined(__AVX2__)
#include "register_tiles.h"
#endif

namespace sparse_item {

using attention::CHUNK;
using attention::State;
using sparse_rows::BLOCK;
using sparse_rows::Rows;
using sparse_rows::Side;
using sparse_rows::STEP;

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

// An item on its way through the packed rows. Expanded rows are whole blocks of channels in an order of their own:
// queries and outputs are kept in that order too.
struct Item {
    State &state, keys, values;
    float *kept, *expanded, scaling;
    alignas(64) uint64_t masks[CHUNK * sparse_rows::MAX_WORDS];

    static int64_t width(int64_t D) { return sparse_rows::blocks(D) * BLOCK; }
    static int64_t floats(const attention::Queries& queries) {
        const int64_t widest = std::max(queries.D, queries.Dv);
        return (STEP + 2 * attention::QUERY_BLOCK) * width(widest) + sparse_rows::scratch_size(widest);
    }
    Item(State& state, const attention::Queries& queries) : state(state), keys(state), values(state), scaling(float(queries.scaling)) {
        keys.width = width(queries.D), values.v_width = width(queries.Dv);
        expanded = state.scratch + CHUNK * std::max(state.width, state.v_width);
        keys.q = expanded + STEP * std::max(keys.width, values.v_width);
        values.out = keys.q + attention::QUERY_BLOCK * keys.width;
        kept = values.out + attention::QUERY_BLOCK * values.v_width;
    }

    // The state whose outputs the values are added to.
    State& outputs(const Side& v) { return v.layout == sparse_rows::ALL ? state : values; }

    template <class T>
    void begin(const attention::Queries& queries, const Side& k, const Side& v, int64_t b, int64_t h) {
        if (v.layout != sparse_rows::ALL) std::fill(values.out, values.out + state.n_q * values.v_width, 0.0f);
        if (k.layout == sparse_rows::ALL) return;
        if (k.plane.bits) {
            arrange_queries<float>(queries.D);
        } else if (UNSCALED<T> && state.n_q <= most_in_registers<T>(k)) {
            copy_queries<T>(queries, b, h);
        } else {
            arrange_queries<T>(queries.D);
        }
    }
    template <class T>
    void end(const Side& v, int64_t Dv) {
        if (v.layout == sparse_rows::ALL) return;
        v.plane.bits ? restore_outputs<float>(Dv) : restore_outputs<T>(Dv);
    }

  private:
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
    void restore_outputs(int64_t Dv) {
        for (int i = 0; i < values.n_q; i++)
            for (int64_t d = 0; d < Dv; d++) state.out[i * state.v_width + d] = values.out[i * values.v_width + sparse_rows::place_of<T>(d)];
    }
};

// The state with its scores from row `from` of the chunk on.
inline State later(State state, int from) {
    state.scores += from;
    return state;
}

// Rows that keep all channels: dense ones or codes. Calls f(rows, stride, from, n).
template <class T, class F>
void with_whole_rows(Item& item, const Rows& rows, int64_t start, int n, F f) {
    const bool widen = (item.state.n_q > 8 && sizeof(T) != sizeof(float)) || rows.D % simd::LANES;
    for (int from = 0; from < n; from += STEP) {
        const int count = std::min(STEP, n - from);
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

// Scores of rows `[start, start + n)`, those of the chunk from `at` on. `prefetch` as in attention.h.
template <class T, class Prefetch>
void score(Item& item, const Rows& k, int64_t start, int n, int at, Prefetch& prefetch) {
    if (k.side->layout == sparse_rows::ALL)
        return with_whole_rows<T>(item, k, start, n, [&](const auto* rows, int64_t stride, int from, int count) {
            attention::score(later(item.state, at + from), rows, stride, count, prefetch);
        });
    with_sparse_rows<T>(item, k, start, n, [&](const auto& kept, const uint64_t* masks, int from, int count) {
        const State keys = later(item.keys, at + from);
#if defined(__AVX2__)
        if (keys.n_q <= most_in_registers<T>(*k.side)) return register_tiles::score(keys, kept, masks, k.words, count, item.scaling, prefetch);
#endif
        attention::score(keys, expanded(item, k, kept, masks, start + from, count, keys.width), keys.width, count, prefetch);
    });
}

template <class T, class Prefetch>
void add_values(Item& item, const Rows& v, int64_t start, int n, int at, Prefetch& prefetch) {
    if (v.side->layout == sparse_rows::ALL)
        return with_whole_rows<T>(item, v, start, n, [&](const auto* rows, int64_t stride, int from, int count) {
            attention::add_values(later(item.state, at + from), rows, stride, count, prefetch);
        });
    with_sparse_rows<T>(item, v, start, n, [&](const auto& kept, const uint64_t* masks, int from, int count) {
        const State values = later(item.values, at + from);
#if defined(__AVX2__)
        if (values.n_q <= most_in_registers<T>(*v.side)) return register_tiles::add_values(values, kept, masks, v.words, count, prefetch);
#endif
        attention::add_values(values, expanded(item, v, kept, masks, start + from, count, values.v_width), values.v_width, count, prefetch);
    });
}

}  // namespace sparse_item
