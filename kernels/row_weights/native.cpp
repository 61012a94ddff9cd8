// row_weights on the CPU: scores of a block of queries with all rows stay near the core until they are weights.
#include "attention.h"
#include "transpose.h"

namespace {

using simd::INF;
using simd::LANES;
using simd::vfloat;
using simd::vint;

// Addresses and strides in elements; channels are adjacent.
struct Call {
    int64_t q, q_batch, q_head, q_row, k, k_batch, k_head, k_row;
    int64_t positions;                                         // int32, contiguous [B, Hkv, N]
    int64_t is_real, is_real_batch, is_real_head, is_real_row;  // bool; address 0: all are
    int64_t out;                                               // float32, contiguous [B, Hkv, N]
    int64_t q_dtype, k_dtype, B, Hkv, G, S, N, D, first, largest, threads;
    double scaling, softcap;  // softcap 0: none
};

// sums of products that fit the registers, of queries with rows, beside the keys and a query
constexpr int TILE = 6;
constexpr int REGISTERS = LANES == 16 ? 4 : 2;
constexpr int PANEL = REGISTERS * LANES;    // rows
constexpr int MAX_TILES = 16;               // of a block of queries
constexpr int64_t HELD_SCORES = 1 << 16;    // of a block, if that is 4 tiles
constexpr int64_t PACKED_KEYS = 1 << 22;    // floats, if that is one head
constexpr int64_t TARGET_SLICES = 32;       // of the queries of all heads, each with sums of its own
constexpr int32_t NOWHERE = INT32_MAX;      // position of a row that nobody sees

// Depends on sizes only, never on the number of threads, so that results do not either.
struct Plan {
    int64_t heads, queries, panels, width, tiles, blocks, slice, slices, at_once;

    explicit Plan(const Call& call) : heads(call.B * call.Hkv), queries(call.G * call.S) {
        panels = (call.N + PANEL - 1) / PANEL, width = panels * PANEL;
        const int64_t needed = (queries + TILE - 1) / TILE, fitting = HELD_SCORES / TILE / std::max<int64_t>(width, 1);
        tiles = std::min(std::clamp<int64_t>(fitting, 4, MAX_TILES), needed);
        blocks = tiles ? (needed + tiles - 1) / tiles : 0;
        slice = (blocks * heads + TARGET_SLICES - 1) / TARGET_SLICES;
        slices = slice ? (blocks + slice - 1) / slice : 0;
        at_once = std::clamp<int64_t>(PACKED_KEYS / std::max<int64_t>(width * call.D, 1), 1, heads);
    }
};

// Rows of one head: keys as [panels, D, PANEL], positions, and the first and the last position of every panel.
struct Rows {
    float* keys;
    int32_t *positions, *lowest, *highest;

    Rows(float* memory, const Call& call, const Plan& plan) : keys(memory) {
        positions = reinterpret_cast<int32_t*>(keys + plan.width * call.D);
        lowest = positions + plan.width, highest = lowest + plan.panels;
    }
    static int64_t size(const Call& call, const Plan& plan) {
        return attention::padded(plan.width * (call.D + 1) + 2 * plan.panels);
    }
};

// Keys of a panel as float32, channel by channel. The last row stands for those behind it, which positions hide.
template <class T>
void pack_panel(const T* k, int64_t stride, int64_t n, int64_t D, float* keys) {
    for (int start = 0; start < PANEL; start += LANES) {
        const T* rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = k + std::min<int64_t>(start + i, n - 1) * stride;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) {
            vfloat x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) x[i] = simd::load(rows[i] + d);
            simd::transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) simd::store(keys + (d + i) * PANEL + start, x[i]);
        }
        for (; d < D; d++)
            for (int i = 0; i < LANES; i++) keys[d * PANEL + start + i] = simd::to_float(rows[i][d]);
    }
}

void pack(const Call& call, int64_t head, int64_t panel, const Rows& rows) {
    const int64_t start = panel * PANEL, n = std::min<int64_t>(PANEL, call.N - start);
    attention::with_type(call.k_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* k = reinterpret_cast<const T*>(call.k) + head / call.Hkv * call.k_batch + head % call.Hkv * call.k_head;
        pack_panel(k + start * call.k_row, call.k_row, n, call.D, rows.keys + start * call.D);
    });
    const int32_t* from = reinterpret_cast<const int32_t*>(call.positions) + head * call.N + start;
    int32_t lowest = NOWHERE, highest = 0;
    for (int i = 0; i < PANEL; i++) {
        const int32_t position = i < n && from[i] >= 0 ? from[i] : NOWHERE;
        rows.positions[start + i] = position;
        lowest = std::min(lowest, position), highest = std::max(highest, position);
    }
    rows.lowest[panel] = lowest, rows.highest[panel] = highest;
}

// A block of queries: those of one token side by side, so that all see about the same rows.
struct Block {
    float* q;          // [tiles, D, TILE]
    float* scores;     // [tiles * TILE, stride]
    int64_t stride;
    int32_t* panels;   // those that any of the queries sees, n_panels of them
    int64_t n_panels;
    int32_t at[MAX_TILES * TILE];  // positions; -1: sees nothing
    vfloat best[MAX_TILES * TILE];
};

void load_queries(const Call& call, int64_t head, int64_t first, int64_t n, Block& block) {
    const int64_t b = head / call.Hkv, h = head % call.Hkv, queries = call.G * call.S;
    const bool* is_real = reinterpret_cast<const bool*>(call.is_real);
    attention::with_type(call.q_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t i = 0; i < n; i++) {
            const int64_t s = (first + i) / call.G, g = (first + i) % call.G;
            float* to = block.q + i / TILE * TILE * call.D + i % TILE;
            const bool is_query = first + i < queries;
            const bool sees = is_query && (!is_real || is_real[b * call.is_real_batch + h * call.is_real_head + s * call.is_real_row]);
            block.at[i] = sees ? int32_t(std::min<int64_t>(call.first + s, NOWHERE - 1)) : -1;
            block.best[i] = simd::splat(-INF);
            const T* from = reinterpret_cast<const T*>(call.q) + b * call.q_batch + (h * call.G + g) * call.q_head + s * call.q_row;
            for (int64_t d = 0; d < call.D; d++) to[d * TILE] = is_query ? simd::to_float(from[d]) * float(call.scaling) : 0.0f;
        }
    });
}

// Scores of a tile of queries with a panel of rows, -inf for what they do not see.
inline void score(const Call& call, const Rows& rows, int64_t panel, Block& block, int64_t first, float* scores) {
    const float *q = block.q + first * call.D, *k = rows.keys + panel * PANEL * call.D;
    vfloat sums[TILE][REGISTERS] = {};
    for (int64_t d = 0; d < call.D; d++, q += TILE, k += PANEL) {
        vfloat x[REGISTERS];
#pragma GCC unroll 4
        for (int r = 0; r < REGISTERS; r++) x[r] = simd::load(k + r * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TILE; i++) {
            const vfloat weight = simd::splat(q[i]);
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) sums[i][r] = simd::fma(weight, x[r], sums[i][r]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < TILE; i++) {
        float* to = scores + (first + i) * block.stride;
#pragma GCC unroll 4
        for (int r = 0; r < REGISTERS; r++) simd::store(to + r * LANES, sums[i][r]);
    }
    const vfloat limit = simd::splat(float(call.softcap)), inverse = simd::splat(1.0f / float(call.softcap));
    for (int i = 0; i < TILE; i++) {
        const int32_t at = block.at[first + i];
        const bool hides = rows.highest[panel] > at;
        for (int r = 0; r < REGISTERS; r++) {
            float* to = scores + (first + i) * block.stride + r * LANES;
            vfloat x = simd::load(to);
            if (call.softcap != 0) x = simd::tanh(x * inverse) * limit;
            if (hides) {
                vint positions;
                std::memcpy(&positions, rows.positions + panel * PANEL + r * LANES, sizeof positions);
                x = simd::select(positions <= at, x, simd::splat(-INF));
            }
            if (call.softcap != 0 || hides) simd::store(to, x);
            block.best[first + i] = simd::max(x, block.best[first + i]);
        }
    }
}

// The larger one, and NaN if either is; the weight is finite or NaN.
inline vfloat larger(vfloat weight, vfloat found) { return simd::max(weight, found) + (weight - weight); }

inline vfloat join(const Call& call, vfloat weight, vfloat found) { return call.largest ? larger(weight, found) : weight + found; }

// Scores of one query become weights, which are joined with those found so far.
void weigh(const Call& call, const Block& block, int64_t i, float* found) {
    float* scores = block.scores + i * block.stride;
    const float top = simd::largest(block.best[i]);
    // a query that sees nothing keeps -inf: subtract 0 there, not -inf - -inf
    const vfloat factor = simd::splat(simd::LOG2_E), shift = simd::splat(top == -INF ? 0.0f : -top * simd::LOG2_E);
    vfloat sums = {};
    for (int64_t t = 0; t < block.n_panels * PANEL; t += LANES) {
        const vfloat x = simd::exp2(simd::fma(simd::load(scores + t), factor, shift));
        simd::store(scores + t, x);
        sums += x;
    }
    const float total = simd::sum(sums);
    if (total == 0) return;
    const vfloat share = simd::splat(1.0f / (call.largest ? total : total * float(call.G)));
    for (int64_t a = 0; a < block.n_panels; a++) {
        float *to = found + int64_t(block.panels[a]) * PANEL, *from = scores + a * PANEL;
        for (int r = 0; r < PANEL; r += LANES)
            simd::store(to + r, join(call, simd::load(from + r) * share, simd::load(to + r)));
    }
}

// What the queries of a slice give every row, `found [width]`.
void run_slice(const Call& call, const Plan& plan, int64_t head, int64_t slice, const Rows& rows, float* found) {
    static thread_local attention::Arena arena;
    Block block;
    // strides of a whole page would fall on the same lines of the cache
    block.stride = plan.width + LANES;
    const int64_t n = plan.tiles * TILE;
    block.q = arena.floats(n * (call.D + block.stride) + plan.panels);
    block.scores = block.q + n * call.D;
    block.panels = reinterpret_cast<int32_t*>(block.scores + n * block.stride);
    std::fill(found, found + plan.width, 0.0f);
    for (int64_t i = slice * plan.slice; i < std::min(plan.blocks, (slice + 1) * plan.slice); i++) {
        load_queries(call, head, i * n, n, block);
        const int32_t last = *std::max_element(block.at, block.at + n);
        block.n_panels = 0;
        for (int64_t p = 0; p < plan.panels; p++)
            if (rows.lowest[p] <= last) block.panels[block.n_panels++] = int32_t(p);
        for (int64_t a = 0; a < block.n_panels; a++)
            for (int64_t first = 0; first < n; first += TILE)
                score(call, rows, block.panels[a], block, first, block.scores + a * PANEL);
        for (int64_t query = 0; query < n; query++)
            if (block.at[query] >= 0) weigh(call, block, query, found);
    }
}

// Slices of a head, in their order.
void merge(const Call& call, const Plan& plan, int64_t head, float* found) {
    for (int64_t slice = 1; slice < plan.slices; slice++)
        for (int64_t t = 0; t < plan.width; t += LANES)
            simd::store(found + t, join(call, simd::load(found + slice * plan.width + t), simd::load(found + t)));
    float* out = reinterpret_cast<float*>(call.out) + head * call.N;
    if (plan.slices) {
        std::copy(found, found + call.N, out);
    } else {
        std::fill(out, out + call.N, 0.0f);
    }
}

template <class F>
void for_each(int64_t n, int threads, F f) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t i = 0; i < n; i++) f(i);
}

}  // namespace

extern "C" void row_weights(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    const Plan plan(call);
    const int64_t rows_size = Rows::size(call, plan), found_size = plan.slices * plan.width;
    static thread_local attention::Arena arena;
    float* memory = arena.floats(plan.at_once * (rows_size + found_size));
    float* found = memory + plan.at_once * rows_size;
    // about 10 us of work: below it waking threads costs more than it gives
    const double work = double(plan.heads) * double(plan.queries + TILE) * double(call.N) * double(call.D);
    const int threads = work < 2e6 ? 1 : int(call.threads);
    for (int64_t start = 0; start < plan.heads; start += plan.at_once) {
        const int64_t n = std::min(plan.at_once, plan.heads - start);
        const auto rows = [&](int64_t head) { return Rows(memory + head * rows_size, call, plan); };
        for_each(n * plan.panels, threads, [&](int64_t i) {
            pack(call, start + i / plan.panels, i % plan.panels, rows(i / plan.panels));
        });
        // the last queries see most: they come first
        for_each(n * plan.slices, threads, [&](int64_t i) {
            const int64_t head = i % n, slice = plan.slices - 1 - i / n;
            run_slice(call, plan, start + head, slice, rows(head), found + head * found_size + slice * plan.width);
        });
        for_each(n, threads, [&](int64_t head) { merge(call, plan, start + head, found + head * found_size); });
    }
}
