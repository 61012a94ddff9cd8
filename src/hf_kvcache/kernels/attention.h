// Attention of a few queries over many rows: what the dense and the packed op share.
//
// The rows of a KV head are cut into ranges; an item of work is (batch, KV head, block of queries, range).
// Each item keeps an online softmax in float32; items of the same queries are merged at the end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include "simd.h"

namespace attention {

using simd::INF;
using simd::LANES;
using simd::vfloat;

constexpr int CHUNK = 128;       // rows scored before their values are added
constexpr int SUB_CHUNK = 32;    // value rows that stay in L1 while the channel tiles pass over them
constexpr int PACE = 4;          // rows that are requested at a time: a burst would wait for its own answers
constexpr int QUERY_BLOCK = 64;  // queries of one item
constexpr int64_t MIN_RANGE = 512;
constexpr int64_t TARGET_ITEMS = 128;

enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Calls f with a null pointer of the storage type `dtype` names.
template <class F>
void with_type(int64_t dtype, F f) {
    if (dtype == BFLOAT16) {
        f(static_cast<simd::bf16*>(nullptr));
    } else if (dtype == FLOAT16) {
        f(static_cast<simd::f16*>(nullptr));
    } else {
        f(static_cast<float*>(nullptr));
    }
}

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// A block of memory that grows and stays with its thread: large blocks fresh from the system cost page faults.
class Arena {
  public:
    float* floats(int64_t n) {
        const int64_t wanted = n + 16;
        if (wanted > size_) {
            std::free(memory_);
            size_ = wanted + wanted / 4;
            memory_ = static_cast<float*>(std::aligned_alloc(64, (size_ * sizeof(float) + 63) / 64 * 64));
            if (!memory_) std::abort();
        }
        return memory_;
    }
    ~Arena() { std::free(memory_); }

  private:
    float* memory_ = nullptr;
    int64_t size_ = 0;
};

// The fields both ops are called with; all of 8 bytes, in the order of `native.py`.
struct Queries {
    int64_t q, q_batch, q_head, q_row;  // address, strides in elements
    int64_t out, lse;                   // contiguous [B, Hq, S, Dv] and [B, Hq, S]
    int64_t mask, mask_batch, mask_head, mask_query;
    int64_t dtype, B, Hkv, G, S, D, Dv, threads;
    double scaling, softcap;  // softcap 0: none
};

class Turn;

// Online softmax of one block of queries over the rows added so far.
struct State {
    Turn* turn;            // of the thread
    int n_q;
    int64_t first;         // index of the first query in [G, S]
    int64_t width, v_width;  // head sizes, rounded up to whole registers
    float softcap;
    float *q, *scores, *top, *total, *out;  // [n_q, width], [n_q, CHUNK], [n_q], [n_q], [n_q, v_width]
    float* scratch;                         // [CHUNK, max(width, v_width)]
};

// Rows that are needed next. The hardware prefetcher stops at page borders: without this a core reads 4 GB/s of 12.
struct Ahead {
    const char* first = nullptr;
    int64_t stride = 0, size = 0;  // bytes
    int n = 0;

    template <class T>
    static Ahead rows(const T* first, int64_t stride, int64_t width, int64_t n) {
        return {reinterpret_cast<const char*>(first), stride * int64_t(sizeof(T)), width * int64_t(sizeof(T)), int(n)};
    }
    void fetch(int from, int count) const {
        for (int t = from; t < std::min(n, from + count); t++)
            for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(first + t * stride + byte, 0, 2);
    }
};

// Where nothing is to be requested.
struct Nothing {
    void fetch(int, int) const {}
};

// ---- scores ----

// Dot products of Q queries with R rows; Q * R == LANES, so they fit one register.
template <int Q, int R, class T>
inline void score_tile(const float* q, int64_t width, const T* const* rows, float* scores) {
    vfloat sums[Q * R];
#pragma GCC unroll 16
    for (int i = 0; i < Q * R; i++) sums[i] = vfloat{};
    for (int64_t d = 0; d < width; d += LANES) {
        vfloat k[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) k[r] = simd::load(rows[r] + d);
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) {
            const vfloat x = simd::load(q + i * width + d);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sums[i * R + r] = simd::fma(x, k[r], sums[i * R + r]);
        }
    }
    float flat[LANES];
    simd::store(flat, simd::sum_each(sums));
    for (int i = 0; i < Q; i++) std::memcpy(scores + i * CHUNK, flat + i * R, R * sizeof(float));
}

template <int Q, class T, class Ahead>
void score_block(const State& state, int first, const T* k, int64_t stride, int n, Ahead& ahead) {
    constexpr int R = LANES / Q;
    for (int t = 0; t < n; t += R) {
        ahead.fetch(t, R);
        const T* rows[R];
        // past the end the last row is scored again; `soften` overwrites those scores
        for (int r = 0; r < R; r++) rows[r] = k + std::min(t + r, n - 1) * stride;
        score_tile<Q, R>(state.q + first * state.width, state.width, rows, state.scores + first * CHUNK + t);
    }
}

// `ahead.fetch(t, count)` is called once for every row: it requests what is needed next.
template <class T, class Ahead = const Nothing>
void score(const State& state, const T* k, int64_t stride, int n, Ahead& ahead = {}) {
    const auto block = [&](int i, int left, auto& once) {
        if (left >= 4) return score_block<4>(state, i, k, stride, n, once), 4;
        if (left >= 2) return score_block<2>(state, i, k, stride, n, once), 2;
        return score_block<1>(state, i, k, stride, n, once), 1;
    };
    const Nothing nothing;
    for (int i = block(0, state.n_q, ahead); i < state.n_q;) i += block(i, state.n_q - i, nothing);
}

// ---- softmax ----

inline void cap(const State& state, int n) {
    const vfloat limit = simd::splat(state.softcap), inverse = simd::splat(1.0f / state.softcap);
    for (int i = 0; i < state.n_q; i++)
        for (int t = 0; t < n; t += LANES) {
            float* x = state.scores + i * CHUNK + t;
            simd::store(x, simd::tanh(simd::load(x) * inverse) * limit);
        }
}

// Scores of hidden rows become -inf. `mask` points at the first row of the chunk for the first query of the head.
inline void hide(const State& state, const uint8_t* mask, int64_t stride, int64_t n_queries, int n) {
    for (int i = 0; i < state.n_q; i++) {
        const uint8_t* visible = mask + (state.first + i) % n_queries * stride;
        float* scores = state.scores + i * CHUNK;
        for (int t = 0; t < n; t++) scores[t] = visible[t] ? scores[t] : -INF;
    }
}

// Scores become exp(score - top); totals and outputs so far are rescaled to the new top.
inline void soften(State& state, int n) {
    for (int i = 0; i < state.n_q; i++) {
        float* scores = state.scores + i * CHUNK;
        const int end = int(padded(n));
        for (int t = n; t < end; t++) scores[t] = -INF;
        vfloat best = simd::splat(state.top[i]);
        for (int t = 0; t < end; t += LANES) best = simd::max(simd::load(scores + t), best);
        const float top = simd::largest(best);
        // a query that has seen nothing keeps top = -inf: subtract 0 there, not -inf - -inf
        const float base = top == -INF ? 0.0f : top;
        vfloat total = {};
        for (int t = 0; t < end; t += LANES) {
            const vfloat p = simd::exp(simd::load(scores + t) - simd::splat(base));
            simd::store(scores + t, p);
            total += p;
        }
        const float carry = state.top[i] == top ? 1.0f : std::exp(state.top[i] - base);
        state.total[i] = state.total[i] * carry + simd::sum(total);
        state.top[i] = top;
        if (carry != 1.0f)
            for (int64_t d = 0; d < state.v_width; d += LANES) {
                float* out = state.out + i * state.v_width + d;
                simd::store(out, simd::load(out) * simd::splat(carry));
            }
    }
}

// ---- values ----

template <int Q, int C, class T, class Ahead>
inline void add_tile(float* out, int64_t width, const float* p, const T* v, int64_t stride, int start, int n, Ahead& ahead) {
    vfloat sums[Q][C];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) sums[i][c] = simd::load(out + i * width + c * LANES);
    for (int t = 0; t < n; t++) {
        if (t % PACE == 0) ahead.fetch(start + t, PACE);
        vfloat x[C];
        for (int c = 0; c < C; c++) x[c] = simd::load(v + (start + t) * stride + c * LANES);
        for (int i = 0; i < Q; i++) {
            const vfloat weight = simd::splat(p[i * CHUNK + start + t]);
            for (int c = 0; c < C; c++) sums[i][c] = simd::fma(weight, x[c], sums[i][c]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) simd::store(out + i * width + c * LANES, sums[i][c]);
}

template <int Q, class T, class Ahead>
void add_block(const State& state, int first, const T* v, int64_t stride, int start, int n, Ahead& ahead) {
    // accumulators, values and a weight stay below the number of registers: 32 with AVX-512, else 16
    constexpr int C = LANES == 16 ? (Q == 4 ? 4 : 8) : (Q == 4 ? 2 : 4);
    const int64_t width = state.v_width;
    float* out = state.out + first * width;
    const float* p = state.scores + first * CHUNK;
    const Nothing nothing;
    const auto tile = [&](auto registers, int64_t d, auto& once) {
        add_tile<Q, decltype(registers)::value>(out + d, width, p, v + d, stride, start, n, once);
    };
    const auto tiles = [&](auto registers, int64_t d) {
        d ? tile(registers, d, nothing) : tile(registers, d, ahead);
        return decltype(registers)::value * LANES;
    };
    int64_t d = 0;
    while (d + C * LANES <= width) d += tiles(std::integral_constant<int, C>(), d);
    while (d < width) d += tiles(std::integral_constant<int, 1>(), d);
}

template <class T, class Ahead = const Nothing>
void add_values(const State& state, const T* v, int64_t stride, int n, Ahead& ahead = {}) {
    const Nothing nothing;
    for (int start = 0; start < n; start += SUB_CHUNK) {
        const int count = std::min(SUB_CHUNK, n - start);
        const auto block = [&](int i, int left, auto& once) {
            if (left >= 4) return add_block<4>(state, i, v, stride, start, count, once), 4;
            if (left >= 2) return add_block<2>(state, i, v, stride, start, count, once), 2;
            return add_block<1>(state, i, v, stride, start, count, once), 1;
        };
        for (int i = block(0, state.n_q, ahead); i < state.n_q;) i += block(i, state.n_q - i, nothing);
    }
}

// ---- rows ----

// Rows as float32, zeros up to a whole number of registers.
template <class T>
void widen(const T* rows, int64_t stride, int n, int64_t D, float* wide) {
    const int64_t width = padded(D), whole = D / LANES * LANES;
    for (int t = 0; t < n; t++) {
        int64_t d = 0;
        for (; d < whole; d += LANES) simd::store(wide + t * width + d, simd::load(rows + t * stride + d));
        for (; d < width; d++) wide[t * width + d] = d < D ? simd::to_float(rows[t * stride + d]) : 0.0f;
    }
}

// Scores of `n` rows to softmax weights. `mask` may be null.
inline void weigh(State& state, const Queries& queries, const uint8_t* mask, int n) {
    if (state.softcap != 0.0f) cap(state, n);
    if (mask) hide(state, mask, queries.mask_query, queries.S, n);
    soften(state, n);
}

// Rows `[start, stop)` of dense keys and values; `mask` points at the first of those rows.
template <class T>
void add_dense(State& state, const Queries& queries, const T* k, int64_t k_stride, const T* v, int64_t v_stride,
               const uint8_t* mask, int64_t n_rows) {
    // ragged head sizes need padding; many queries repay one conversion
    const bool many = state.n_q > 8 && sizeof(T) != sizeof(float);
    const bool widen_k = many || queries.D % LANES, widen_v = many || queries.Dv % LANES;
    for (int64_t start = 0; start < n_rows; start += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, n_rows - start));
        const T *k_rows = k + start * k_stride, *v_rows = v + start * v_stride;
        const Ahead next_v = Ahead::rows(v_rows, v_stride, queries.Dv, n);
        const Ahead next_k = Ahead::rows(k_rows + n * k_stride, k_stride, queries.D, std::min<int64_t>(CHUNK, n_rows - start - n));
        if (widen_k) {
            widen(k_rows, k_stride, n, queries.D, state.scratch);
            score(state, state.scratch, state.width, n, next_v);
        } else {
            score(state, k_rows, k_stride, n, next_v);
        }
        weigh(state, queries, mask ? mask + start : nullptr, n);
        if (widen_v) {
            widen(v_rows, v_stride, n, queries.Dv, state.scratch);
            add_values(state, state.scratch, state.v_width, n, next_k);
        } else {
            add_values(state, v_rows, v_stride, n, next_k);
        }
    }
}

inline const uint8_t* mask_of(const Queries& queries, int64_t b, int64_t h, int64_t row) {
    if (!queries.mask) return nullptr;
    return reinterpret_cast<const uint8_t*>(queries.mask) + b * queries.mask_batch + h * queries.mask_head + row;
}

// Dense rows that follow packed ones; the fields in the order of `native.py`.
struct Tail {
    int64_t k, k_batch, k_head, k_row, v, v_batch, v_head, v_row, n_packed, n_rows;  // strides in elements

    int64_t all_rows() const { return n_packed + n_rows; }

    // Rows `[start, stop)` of both parts: packed ones go to `add_packed(start, stop)`.
    template <class T, class F>
    void add(State& state, const Queries& queries, int64_t b, int64_t h, int64_t start, int64_t stop, F add_packed) const {
        if (start < n_packed) add_packed(start, std::min(stop, n_packed));
        if (stop <= n_packed) return;
        start = std::max(start, n_packed) - n_packed, stop -= n_packed;
        const T* keys = reinterpret_cast<const T*>(k) + b * k_batch + h * k_head + start * k_row;
        const T* values = reinterpret_cast<const T*>(v) + b * v_batch + h * v_head + start * v_row;
        add_dense(state, queries, keys, k_row, values, v_row, mask_of(queries, b, h, n_packed + start), stop - start);
    }
};

// ---- items ----

// Items of a call: the rows of every head are cut into ranges of one size, the last one shorter.
struct Partition {
    struct Head {
        int64_t rows, range, n_ranges, first_item;
    };
    struct Item {
        int64_t head, block, start, stop;
    };
    int64_t n_blocks, queries_per_head, n_items = 0, n_rows = 0;
    std::vector<Head> heads;

    // `rows(head)` of B * Hkv heads. Depends on sizes only, never on the number of threads, so that results do not either.
    template <class Rows>
    Partition(const Queries& queries, Rows rows) : queries_per_head(queries.G * queries.S), heads(queries.B * queries.Hkv) {
        n_blocks = (queries_per_head + QUERY_BLOCK - 1) / QUERY_BLOCK;
        for (size_t h = 0; h < heads.size(); h++) n_rows += heads[h].rows = rows(int64_t(h));
        const int64_t work = std::max<int64_t>(1, n_rows * n_blocks);
        for (Head& head : heads) {
            const int64_t most = std::max<int64_t>(1, head.rows / MIN_RANGE);
            const int64_t wanted = std::clamp<int64_t>((head.rows * TARGET_ITEMS + work - 1) / work, 1, most);
            head.range = std::max<int64_t>(CHUNK, ((head.rows + wanted - 1) / wanted + CHUNK - 1) / CHUNK * CHUNK);
            head.n_ranges = std::max<int64_t>(1, (head.rows + head.range - 1) / head.range);
            head.first_item = n_items;
            n_items += head.n_ranges * n_blocks;
        }
    }

    Item item(int64_t i) const {
        const auto starts_later = [](int64_t i, const Head& head) { return i < head.first_item; };
        const int64_t h = std::upper_bound(heads.begin(), heads.end(), i, starts_later) - heads.begin() - 1;
        const Head& head = heads[h];
        const int64_t inside = i - head.first_item, first = inside % head.n_ranges * head.range;
        return {h, inside / head.n_ranges, first, std::min(head.rows, first + head.range)};
    }
};

// Hands items to a thread. An op that asks for the next one early can request its rows early.
class Turn {
  public:
    explicit Turn(std::atomic<int64_t>& counter) : counter_(counter) {}

    int64_t take() {
        foreseen_ = next_ >= 0;
        const int64_t item = next();
        next_ = -1;
        return item;
    }
    int64_t next() {
        if (next_ < 0) next_ = counter_.fetch_add(1, std::memory_order_relaxed);
        return next_;
    }
    bool foreseen() const { return foreseen_; }

  private:
    std::atomic<int64_t>& counter_;
    int64_t next_ = -1;
    bool foreseen_ = false;
};

inline void start(State& state, const Queries& queries, const Partition& part, int64_t head, int64_t block) {
    state.first = block * QUERY_BLOCK;
    state.n_q = int(std::min<int64_t>(QUERY_BLOCK, part.queries_per_head - state.first));
    const int64_t b = head / queries.Hkv, h = head % queries.Hkv;
    with_type(queries.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int i = 0; i < state.n_q; i++) {
            const int64_t g = (state.first + i) / queries.S, s = (state.first + i) % queries.S;
            const T* from = reinterpret_cast<const T*>(queries.q) + b * queries.q_batch +
                            (h * queries.G + g) * queries.q_head + s * queries.q_row;
            float* to = state.q + i * state.width;
            for (int64_t d = 0; d < queries.D; d++) to[d] = simd::to_float(from[d]) * float(queries.scaling);
            std::fill(to + queries.D, to + state.width, 0.0f);
        }
    });
    std::fill(state.top, state.top + state.n_q, -INF);
    std::fill(state.total, state.total + state.n_q, 0.0f);
    std::fill(state.out, state.out + state.n_q * state.v_width, 0.0f);
}

// What an item leaves behind for each query: top, total, out [v_width].
inline int64_t partial_size(int64_t v_width) { return v_width + LANES; }

inline void leave(const State& state, float* partials) {
    for (int i = 0; i < state.n_q; i++) {
        float* partial = partials + i * partial_size(state.v_width);
        partial[0] = state.top[i], partial[1] = state.total[i];
        std::memcpy(partial + LANES, state.out + i * state.v_width, state.v_width * sizeof(float));
    }
}

// One query: the partials of its ranges, `stride` floats apart, to its output row and log-sum-exp.
template <class T>
void merge(float* partials, int64_t stride, int64_t n_ranges, int64_t v_width, int64_t Dv, T* out, float* lse) {
    float top = -INF, total = 0;
    for (int64_t i = 0; i < n_ranges; i++) top = std::max(top, partials[i * stride]);
    const float base = top == -INF ? 0.0f : top;
    float* sum = partials + LANES;
    for (int64_t i = 0; i < n_ranges; i++) {
        const float* partial = partials + i * stride;
        const float weight = std::exp(partial[0] - base);
        total += weight * partial[1];
        for (int64_t d = 0; d < v_width; d += LANES) {
            const vfloat x = simd::load(partial + LANES + d) * simd::splat(weight);
            simd::store(sum + d, i ? simd::load(sum + d) + x : x);
        }
    }
    // !(total > tiny) would lose a NaN
    const float divisor = total < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : total;
    for (int64_t d = 0; d < Dv; d++) out[d] = simd::from_float<T>(sum[d] / divisor);
    *lse = top + std::log(total);
}

// Runs `add(state, b, h, start, stop)` over all items and merges.
template <class Add>
void attend(const Queries& queries, const Partition& part, int64_t extra_floats, Add add) {
    const int64_t width = padded(queries.D), v_width = padded(queries.Dv);
    const int64_t items = part.n_items, query_size = partial_size(v_width);
    const int64_t block_rows = std::min<int64_t>(QUERY_BLOCK, part.queries_per_head), item_size = block_rows * query_size;
    const int64_t wide = CHUNK * std::max(width, v_width);
    const int64_t state_floats = block_rows * (width + v_width + CHUNK + 2) + 2 * LANES + wide + extra_floats;
    static thread_local Arena partial_arena;
    float* partials = partial_arena.floats(items * item_size);
    // about 10 us of work: below it waking threads costs more than it gives
    const double work = double(part.n_rows) * double(queries.D + queries.Dv) * double(part.queries_per_head + 8);
    const int threads = work < 2e6 ? 1 : int(std::min<int64_t>(queries.threads, items));
    const int64_t n_queries = int64_t(part.heads.size()) * part.queries_per_head;

    const auto run_item = [&](int64_t i, Turn& turn) {
        static thread_local Arena arena;
        const Partition::Item item = part.item(i);
        State state;
        state.turn = &turn;
        state.width = width, state.v_width = v_width, state.softcap = float(queries.softcap);
        float* memory = arena.floats(state_floats);
        state.q = memory, memory += block_rows * width;
        state.out = memory, memory += block_rows * v_width;
        state.scores = memory, memory += block_rows * CHUNK;
        state.scratch = memory, memory += wide + extra_floats;
        state.top = memory, memory += padded(block_rows);
        state.total = memory;
        start(state, queries, part, item.head, item.block);
        if (item.stop > item.start) add(state, item.head / queries.Hkv, item.head % queries.Hkv, item.start, item.stop);
        leave(state, partials + i * item_size);
    };
    const auto run_merge = [&](int64_t query) {
        const int64_t head = query / part.queries_per_head, inside = query % part.queries_per_head;
        const Partition::Head& rows = part.heads[head];
        const int64_t item = rows.first_item + inside / QUERY_BLOCK * rows.n_ranges;
        float* first = partials + item * item_size + inside % QUERY_BLOCK * query_size;
        with_type(queries.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            merge(first, item_size, rows.n_ranges, v_width, queries.Dv, reinterpret_cast<T*>(queries.out) + query * queries.Dv,
                  reinterpret_cast<float*>(queries.lse) + query);
        });
    };
    std::atomic<int64_t> counter{0};
    const auto run_items = [&] {
        Turn turn(counter);
        for (int64_t i = turn.take(); i < items; i = turn.take()) run_item(i, turn);
    };
    if (threads <= 1) {
        run_items();
        for (int64_t i = 0; i < n_queries; i++) run_merge(i);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        run_items();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n_queries; i++) run_merge(i);
    }
}

// The same where all heads have `n_rows` rows.
template <class Add>
void attend(const Queries& queries, int64_t n_rows, int64_t extra_floats, Add add) {
    attend(queries, Partition(queries, [&](int64_t) { return n_rows; }), extra_floats, add);
}

}  // namespace attention
