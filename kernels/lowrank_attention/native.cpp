// lowrank_attention on the CPU: a chunk of latents makes scores and takes weights for all heads of an item before the
// next one is read. Keys are rebuilt in L1, values stay latents.
#include "expansion.h"

#if defined(__AVX512BF16__)
#include "pairs.h"
#endif

namespace {

using attention::CHUNK;
using attention::QUERY_BLOCK;
using attention::State;
using expansion::Channels;
using expansion::Rebuild;
using expansion::TILE;
using latents::Side;

// `queries` sees one head for the `span` KV heads of an item, and queries in float32.
struct Call {
    attention::Queries queries;
    Side k, v;
    Rebuild rebuild;  // up 0: absorbed
    int64_t dtype, n_heads, span, n_rows;

    Channels channels() const { return {queries.D, rebuild.half}; }
    bool absorbed() const { return !rebuild.up; }
};

// Room of an item behind its state.
struct Room {
    float *q, *cosines, *keys, *weights, *block;
    latents::Room rows;

    // q holds projected queries in bfloat16 or queries in the order of rebuilt channels
    template <class F>
    static void lay_out(const Call& call, F take) {
        const int64_t width = call.absorbed() ? 0 : call.channels().width();
        take(QUERY_BLOCK * std::max(width, latents::padded(call.k.rank) / 2));
        take(CHUNK * 2 * call.channels().pairs * simd::LANES);
        take(TILE * width);
        take(QUERY_BLOCK * CHUNK / 2);
        take(CHUNK * (call.v.rank + 63) / 64 * 32);
        take(latents::Room::floats(std::max(call.k.rank, call.v.rank)));
    }
    static int64_t floats(const Call& call) {
        int64_t total = 16;
        lay_out(call, [&](int64_t n) { total += attention::padded(n) + 16; });
        return total;
    }
    Room(const Call& call, float* memory) {
        // registers are stored whole: keep every part aligned
        memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
        float* parts[6];
        int i = 0;
        lay_out(call, [&](int64_t n) { parts[i++] = memory, memory += (n + 15) / 16 * 16; });
        q = parts[0], cosines = parts[1], keys = parts[2], weights = parts[3], block = parts[4];
        rows = latents::Room(parts[5], std::max(call.k.rank, call.v.rank));
    }
};

template <class T>
struct Item {
    using X = products::FactorOf<T>;
    static constexpr bool PAIRS = !std::is_same_v<X, float>;

    const Call& call;
    const expansion::Packed<X>& packed;
    State& state;
    int64_t b, first_head;
    Room room;
    latents::Prefetch prefetch;

    Item(const Call& call, const expansion::Packed<X>& packed, State& state, int64_t b, int64_t unit, int64_t start,
         int64_t stop)
        : call(call),
          packed(packed),
          state(state),
          b(b),
          first_head(unit * call.span),
          room(call, state.scratch + CHUNK * std::max(state.width, state.v_width)),
          prefetch(call.k, call.v, sizeof(T), b, first_head, call.span, start, stop, work()) {
        if (!call.absorbed()) arrange_queries();
#if defined(__AVX512BF16__)
        if (PAIRS && call.absorbed()) narrow_queries();
#endif
    }

    int64_t per_head() const { return call.queries.G * call.queries.S / call.span; }

    // Products of a chunk.
    int64_t work() const {
        int64_t n_rebuilt = 0;
        for (int64_t j = 0; j < call.span; j++) n_rebuilt += heads(j, j + 1).n_q > 0;
        const int64_t keys =
            call.absorbed() ? state.n_q * (call.k.rank + latents::DOT) : n_rebuilt * packed.head_size();
        return CHUNK * (keys + state.n_q * call.v.rank);
    }

    void arrange_queries() {
        const Channels& channels = packed.channels;
        const int64_t width = channels.width();
        std::fill(room.q, room.q + state.n_q * width, 0.0f);
        for (int64_t d = 0; d < channels.D; d++) {
            const int64_t place = channels.place(d);
            for (int i = 0; i < state.n_q; i++) room.q[i * width + place] = state.q[i * state.width + d];
        }
    }

#if defined(__AVX512BF16__)
    // Projected queries as they came, exact in bfloat16.
    void narrow_queries() {
        const attention::Queries& queries = call.queries;
        const int64_t width = latents::padded(queries.D), unit = first_head / call.span;
        simd::bf16* to = reinterpret_cast<simd::bf16*>(room.q);
        for (int i = 0; i < state.n_q; i++, to += width) {
            const int64_t g = (state.first + i) / queries.S, s = (state.first + i) % queries.S;
            const float* from = reinterpret_cast<const float*>(queries.q) + b * queries.q_batch +
                                (unit * queries.G + g) * queries.q_head + s * queries.q_row;
            latents::narrow(from, queries.D, to);
            std::fill(to + queries.D, to + width, simd::bf16{});
        }
    }
#endif

    // The part of the state of KV heads `[from, to)` of the item.
    State heads(int64_t from, int64_t to) const {
        const int64_t first = std::max<int64_t>(0, from * per_head() - state.first);
        const int64_t stop = std::min<int64_t>(state.n_q, to * per_head() - state.first);
        State part = state;
        part.n_q = int(std::max<int64_t>(0, stop - first)), part.first += first;
        if (!part.n_q) return part;
        part.q += first * state.width, part.scores += first * CHUNK, part.out += first * state.v_width;
        part.top += first, part.total += first;
        return part;
    }
    int64_t index(const State& part) const { return part.first - state.first; }

    void add(int64_t start, int64_t stop) {
        for (int64_t first = start; first < stop; first += CHUNK) {
            const int n = int(std::min<int64_t>(CHUNK, stop - first));
            score(first, n);
            for (int64_t j = 0; j < call.span; j++) {
                State part = heads(j, j + 1);
                if (part.n_q)
                    attention::weigh(part, call.queries, attention::mask_of(call.queries, b, first_head + j, first), n);
            }
            add_values(first, n);
        }
    }

    // ---- keys ----

    void score(int64_t first, int n) {
        const bool shared = call.rebuild.positions && !call.rebuild.positions_head;
        if (shared) angles(0, first, n);
        const int64_t step = call.k.heads;
        for (int64_t j = 0; j < call.span; j += step) {
            const State part = heads(j, j + step);
            if (!part.n_q) continue;
            const int64_t group = (first_head + j) / step;
            if (call.absorbed()) {
                score_latents(part, group, first, n);
                continue;
            }
            const latents::Rows<X> rows =
                latents::rows<T, X>(call.k, b, group, first, n, products::Factor<X>::DEPTH, room.rows);
            for (int64_t i = j; i < j + step; i++) {
                if (call.rebuild.positions && !shared) angles(first_head + i, first, n);
                score_keys(heads(i, i + 1), first_head + i, rows, n);
            }
        }
    }

    void angles(int64_t head, int64_t first, int n) {
        const int32_t* positions = reinterpret_cast<const int32_t*>(call.rebuild.positions) +
                                   b * call.rebuild.positions_batch + head * call.rebuild.positions_head + first;
        expansion::angles(call.rebuild, packed.channels, positions, n, room.cosines);
    }

    void score_keys(State part, int64_t head, const latents::Rows<X>& rows, int n) {
        if (!part.n_q) return;
        part.width = packed.channels.width(), part.q = room.q + index(part) * part.width;
        for (int from = 0; from < n; from += TILE, part.scores += TILE) {
            const int count = std::min(TILE, n - from);
            expansion::rebuild_keys(packed, head, rows, room.cosines, from, count, room.keys, prefetch);
            attention::score(part, room.keys, part.width, count);
        }
    }

    void score_latents(const State& part, int64_t group, int64_t first, int n) {
#if defined(__AVX512BF16__)
        if constexpr (PAIRS) {
            const latents::Rows<X> rows = latents::rows<T, X>(call.k, b, group, first, n, 32, room.rows);
            const int64_t width = latents::padded(call.k.rank);
            return pairs::score(part, reinterpret_cast<X*>(room.q) + index(part) * width, width,
                                float(call.queries.scaling), rows, n, prefetch);
        }
#endif
        const auto score = [&](const auto* rows, int64_t stride) {
            in_steps(part, n, call.k.rank + latents::DOT, [&](const State& some, int from, int count) {
                attention::score(some, rows + from * stride, stride, count);
            });
        };
        if (in_place(call.k, part)) return score(latents::at<T>(call.k, b, group, first), call.k.plane.row);
        const latents::Rows<float> rows = latents::rows<T, float>(call.k, b, group, first, n, simd::LANES, room.rows);
        score(rows.first, rows.stride);
    }

    // Calls f(state, from, count) for rows that fit L1 and requests memory in between.
    template <class F>
    void in_steps(State part, int n, int64_t work, F f) {
        for (int from = 0; from < n; from += attention::SUB_CHUNK, part.scores += attention::SUB_CHUNK) {
            const int count = std::min(attention::SUB_CHUNK, n - from);
            f(part, from, count);
            prefetch.did(part.n_q * work * count);
        }
    }

    // Rows that registers can take as they are, where many queries do not repay one conversion.
    static bool in_place(const Side& side, const State& part) {
        return !side.plane.bits && side.rank % simd::LANES == 0 && (part.n_q <= 8 || sizeof(T) == sizeof(float));
    }

    // ---- values ----

    void add_values(int64_t first, int n) {
        const int64_t step = call.v.heads;
        for (int64_t j = 0; j < call.span; j += step) {
            const State part = heads(j, j + step);
            if (!part.n_q) continue;
            add_group(part, (first_head + j) / step, first, n);
        }
    }

    void add_group(const State& part, int64_t group, int64_t first, int n) {
#if defined(__AVX512BF16__)
        if constexpr (PAIRS) {
            return pairs::add_values<T>(part, call.v, b, group, first, n, room.rows, reinterpret_cast<X*>(room.weights),
                                        reinterpret_cast<X*>(room.block), prefetch);
        }
#endif
        const auto add = [&](const auto* rows, int64_t stride) {
            in_steps(part, n, call.v.rank, [&](const State& some, int from, int count) {
                attention::add_values(some, rows + from * stride, stride, count);
            });
        };
        if (in_place(call.v, part)) return add(latents::at<T>(call.v, b, group, first), call.v.plane.row);
        const latents::Rows<float> rows = latents::rows<T, float>(call.v, b, group, first, n, simd::LANES, room.rows);
        add(rows.first, rows.stride);
    }
};

template <class T>
void run(const Call& call) {
    using X = products::FactorOf<T>;
    constexpr int DEPTH = products::Factor<X>::DEPTH;
    static thread_local attention::Arena arena;
    const Channels channels = call.channels();
    expansion::Packed<X> packed{channels, (call.k.rank + DEPTH - 1) / DEPTH, nullptr, nullptr, nullptr};
    if (!call.absorbed()) {
        const int64_t width = channels.width(), heads = call.n_heads;
        float* memory = arena.floats(heads * (packed.head_size() * int64_t(sizeof(X)) / 4 + 2 * width));
        X* up = reinterpret_cast<X*>(memory);
        float *mean = memory + heads * (packed.head_size() * int64_t(sizeof(X)) / 4), *sums = mean + heads * width;
        // small ones are packed sooner than threads wake
        const int threads = heads * call.k.rank * width < 200000 ? 1 : int(std::min(heads, call.queries.threads));
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t h = 0; h < heads; h++)
            expansion::pack_head<T>(call.rebuild, channels, call.k.rank, h, up + h * packed.head_size(),
                                    mean + h * width, sums + h * width);
        packed.up = up, packed.mean = mean, packed.sums = sums;
    }
    attention::attend(call.queries, call.n_rows, Room::floats(call),
                      [&](State& state, int64_t b, int64_t unit, int64_t start, int64_t stop) {
                          Item<T>(call, packed, state, b, unit, start, stop).add(start, stop);
                      });
}

}  // namespace

extern "C" void lowrank_attention(const char* bytes) {
    Call call;
    std::memcpy(&call, bytes, sizeof call);
    attention::with_type(call.dtype, [&](auto* type) { run<std::remove_pointer_t<decltype(type)>>(call); });
}
