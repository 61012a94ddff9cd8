// prompt_attention on the CPU: many queries over dense rows, of which each sees one more than the one before it.
//
// The rows of a KV head are packed once, in the order in which products read them: keys with channels outside and rows
// inside, values as they are, both in steps of the inner channels that one product takes. An item of work is (batch,
// query head, block of queries); it passes over the rows it sees, block by block, with an online softmax in float32.
#include "products.h"

namespace {

using attention::Arena;
using products::Factor;
using simd::INF;
using simd::LANES;
using simd::vfloat;

constexpr int QUERIES = 48;  // of an item
constexpr int ROWS = 256;    // of a block: packed keys, values, scores and weights of one fit into L2
constexpr int M = LANES == 4 ? 4 : 6;                        // queries of a product
constexpr int C = LANES == 16 ? 4 : 2;                       // registers of columns of a product
constexpr int PANEL = C * LANES;                             // rows of keys packed together
static_assert(QUERIES % M == 0 && ROWS % PANEL == 0, "blocks are whole products");

// Addresses, strides in elements, sizes; in the order of `native.py`.
struct Call {
    int64_t q, q_batch, q_head, q_row;
    int64_t k, k_batch, k_head, k_row, v, v_batch, v_head, v_row;
    int64_t out, out_batch, out_head, out_row;
    int64_t lse;      // contiguous [B, Hq, S]
    int64_t is_real;  // contiguous bool [B, N]; address 0: all are
    int64_t dtype, B, Hkv, G, S, N, D, Dv, own;  // own: the row of the first query, which may be outside
    int64_t threads;
    double scaling, softcap;  // softcap 0: none

    template <class T>
    const T* head(int64_t rows, int64_t batch, int64_t head_stride, int64_t b, int64_t h) const {
        return reinterpret_cast<const T*>(rows) + b * batch + h * head_stride;
    }
};

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline void put(float* to, float x) { *to = x; }
inline void put(simd::bf16* to, float x) { *to = simd::from_float<simd::bf16>(x); }
inline void put(simd::bf16* to, simd::bf16 x) { *to = x; }
inline void put(float* to, simd::bf16 x) { *to = simd::to_float(x); }
inline void put(float* to, simd::f16 x) { *to = simd::to_float(x); }

// Weights of consecutive rows.
inline void put_weights(float* to, vfloat a, vfloat b) { simd::store(to, a), simd::store(to + LANES, b); }
#if defined(__AVX512BF16__)
inline void put_weights(simd::bf16* to, vfloat a, vfloat b) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#endif

// The rows of all KV heads, packed; X is what products multiply.
template <class X>
struct Packed {
    static constexpr int DEPTH = Factor<X>::DEPTH;
    int64_t n_rows, width, v_width;  // padded: N to blocks, D to steps, Dv to registers
    X *keys, *values;

    Packed(const Call& call, Arena& arena)
        : n_rows(rounded(call.N, ROWS)), width(rounded(call.D, DEPTH)), v_width(rounded(call.Dv, LANES)) {
        const int64_t heads = call.B * call.Hkv;
        keys = reinterpret_cast<X*>(arena.floats(heads * n_rows * (width + v_width) * int64_t(sizeof(X)) / 4 + 16));
        values = keys + heads * n_rows * width;
    }
    // Keys of a panel: [width / DEPTH, PANEL, DEPTH]
    X* panel(int64_t head, int64_t row) const { return keys + head * n_rows * width + row / PANEL * PANEL * width; }
    // Values of rows from an even one on: [rows / DEPTH, v_width, DEPTH]
    X* value(int64_t head, int64_t row) const { return values + head * n_rows * v_width + row * v_width; }

    // Packs the rows `[row, row + PANEL)` of a head; what is not there is zero.
    template <class T>
    void take(const Call& call, int64_t head, int64_t row) const {
        const int64_t b = head / call.Hkv, h = head % call.Hkv, n = std::min<int64_t>(PANEL, call.N - row);
        const T* k = call.head<T>(call.k, call.k_batch, call.k_head, b, h) + row * call.k_row;
        const T* v = call.head<T>(call.v, call.v_batch, call.v_head, b, h) + row * call.v_row;
        X *key = panel(head, row), *v_to = value(head, row);
        for (int64_t d = 0; d < width; d++)
            for (int64_t j = 0; j < PANEL; j++) {
                X* to = key + (d / DEPTH * PANEL + j) * DEPTH + d % DEPTH;
                if (j < n && d < call.D) put(to, k[j * call.k_row + d]);
                else put(to, 0.0f);
            }
        for (int64_t j = 0; j < PANEL; j++)
            for (int64_t d = 0; d < v_width; d++) {
                X* to = v_to + (j / DEPTH * v_width + d) * DEPTH + j % DEPTH;
                if (j < n && d < call.Dv) put(to, v[j * call.v_row + d]);
                else put(to, 0.0f);
            }
    }
};

// out = or += M rows `a` times K registers of columns of `b`, whose steps of the inner channel are `apart` elements apart.
template <int K, class X>
void product(const X* a, int64_t a_stride, int64_t steps, const X* b, int64_t apart, float* out, int64_t stride, bool adds) {
    const X* rows[M];
    vfloat sums[M][K];
    for (int m = 0; m < M; m++) {
        rows[m] = a + m * a_stride;
        for (int c = 0; c < K; c++) sums[m][c] = adds ? simd::load(out + m * stride + c * LANES) : vfloat{};
    }
    products::multiply<M, K, X>(rows, steps, [&](int64_t step, auto* x) {
        for (int c = 0; c < K; c++) x[c] = Factor<X>::load(b + step * apart + c * LANES * Factor<X>::DEPTH);
    }, sums);
    for (int m = 0; m < M; m++)
        for (int c = 0; c < K; c++) simd::store(out + m * stride + c * LANES, sums[m][c]);
}

// One block of queries of one head.
template <class X>
struct Item {
    const Call& call;
    const Packed<X>& packed;
    const float* bias;  // zero or -inf for every row of the batch row; null: all are seen
    int64_t head, first;
    int n_queries;
    X *q, *weights;                     // [QUERIES, width], [QUERIES, ROWS]
    float *scores, *out, *top, *total;  // [QUERIES, ROWS], [QUERIES, v_width], [QUERIES], [QUERIES]

    static int64_t n_floats(const Packed<X>& packed) {
        return QUERIES * (packed.width + 2 * ROWS + packed.v_width + 2) + 4 * LANES;
    }

    Item(const Call& call, const Packed<X>& packed, const float* bias, int64_t head, int64_t first, float* memory)
        : call(call), packed(packed), bias(bias), head(head), first(first) {
        n_queries = int(std::min<int64_t>(QUERIES, call.S - first));
        scores = memory, memory += QUERIES * ROWS;
        out = memory, memory += QUERIES * packed.v_width;
        top = memory, memory += QUERIES;
        total = memory, memory += QUERIES;
        q = reinterpret_cast<X*>(memory), memory += QUERIES * packed.width;
        weights = reinterpret_cast<X*>(memory);
    }

    int64_t kv_head() const { return head / (call.Hkv * call.G) * call.Hkv + head % (call.Hkv * call.G) / call.G; }
    // Rows that query `i` may see are before this one.
    int64_t limit(int i) const { return std::clamp<int64_t>(call.own + first + i + 1, 0, call.N); }

    template <class T>
    void run() {
        const int64_t b = head / (call.Hkv * call.G), h = head % (call.Hkv * call.G);
        const T* from = call.head<T>(call.q, call.q_batch, call.q_head, b, h) + first * call.q_row;
        std::memset(static_cast<void*>(q), 0, QUERIES * packed.width * sizeof(X));
        for (int i = 0; i < n_queries; i++)
            for (int64_t d = 0; d < call.D; d++) put(q + i * packed.width + d, from[i * call.q_row + d]);
        std::fill(out, out + QUERIES * packed.v_width, 0.0f);
        std::fill(top, top + QUERIES, -INF);
        std::fill(total, total + QUERIES, 0.0f);
        for (int64_t row = 0; row < limit(n_queries - 1); row += ROWS)
            if (is_seen(row)) add(row, int(std::min<int64_t>(ROWS, rounded(limit(n_queries - 1) - row, PANEL))));
        leave<T>(b, h);
    }

    bool is_seen(int64_t row) const {
        if (!bias) return true;
        for (int64_t j = row; j < std::min(row + ROWS, call.N); j++)
            if (bias[j] == 0.0f) return true;
        return false;
    }

    void add(int64_t row, int n) {
        constexpr int DEPTH = Factor<X>::DEPTH;
        const int64_t width = packed.width, v_width = packed.v_width, kv = kv_head();
        const int end = int(rounded(n_queries, M));
        for (int j = 0; j < n; j += PANEL)
            for (int i = 0; i < end; i += M)
                product<C>(q + i * width, width, width / DEPTH, packed.panel(kv, row + j), PANEL * DEPTH,
                           scores + i * ROWS + j, ROWS, false);
        for (int i = 0; i < n_queries; i++) soften(i, row, n);
        const X* v = packed.value(kv, row);
        for (int i = 0; i < end; i += M) {
            const X* w = weights + i * ROWS;
            float* to = out + i * v_width;
            int64_t d = 0;
            for (; d + PANEL <= v_width; d += PANEL)
                product<C>(w, ROWS, n / DEPTH, v + d * DEPTH, v_width * DEPTH, to + d, v_width, true);
            for (; d < v_width; d += LANES)
                product<1>(w, ROWS, n / DEPTH, v + d * DEPTH, v_width * DEPTH, to + d, v_width, true);
        }
    }

    // Scores of query `i` become weights; its total and output so far are rescaled to the new top.
    void soften(int i, int64_t row, int n) {
        float* x = scores + i * ROWS;
        const int seen = int(std::clamp<int64_t>(limit(i) - row, 0, n));
        const bool is_plain = call.softcap == 0 && !bias && call.scaling > 0;
        if (!is_plain) finish(x, row, n);
        for (int j = seen; j < n; j++) x[j] = -INF;
        vfloat best = simd::splat(-INF);
        for (int j = 0; j < n; j += LANES) best = simd::max(simd::load(x + j), best);
        const float scaling = is_plain ? float(call.scaling) : 1.0f;
        const float highest = std::max(simd::largest(best) * scaling, top[i]), base = highest == -INF ? 0.0f : highest;
        const vfloat factor = simd::splat(scaling * simd::LOG2_E), shift = simd::splat(-base * simd::LOG2_E);
        vfloat sum = {};
        for (int j = 0; j < n; j += 2 * LANES) {
            const vfloat a = simd::exp2(simd::fma(simd::load(x + j), factor, shift));
            const vfloat b = simd::exp2(simd::fma(simd::load(x + j + LANES), factor, shift));
            sum += a + b;
            put_weights(weights + i * ROWS + j, a, b);
        }
        const float carry = top[i] == highest ? 1.0f : std::exp(top[i] - base);
        total[i] = total[i] * carry + simd::sum(sum), top[i] = highest;
        if (carry != 1.0f)
            for (int64_t d = 0; d < packed.v_width; d += LANES) {
                float* o = out + i * packed.v_width + d;
                simd::store(o, simd::load(o) * simd::splat(carry));
            }
    }

    // Products become scores that are scaled, capped and hidden.
    void finish(float* x, int64_t row, int n) const {
        const vfloat scaling = simd::splat(float(call.scaling));
        const float softcap = float(call.softcap);
        for (int j = 0; j < n; j += LANES) {
            vfloat score = simd::load(x + j) * scaling;
            if (softcap != 0.0f) score = simd::tanh(score * simd::splat(1.0f / softcap)) * simd::splat(softcap);
            // a sum would let a NaN of padding through
            if (bias) score = simd::select(simd::load(bias + row + j) == vfloat{}, score, simd::splat(-INF));
            simd::store(x + j, score);
        }
    }

    template <class T>
    void leave(int64_t b, int64_t h) const {
        T* to = reinterpret_cast<T*>(call.out) + b * call.out_batch + h * call.out_head + first * call.out_row;
        float* lse = reinterpret_cast<float*>(call.lse) + head * call.S + first;
        for (int i = 0; i < n_queries; i++) {
            // !(total > tiny) would lose a NaN
            const float tiny = std::numeric_limits<float>::min(), divisor = total[i] < tiny ? tiny : total[i];
            for (int64_t d = 0; d < call.Dv; d++)
                to[i * call.out_row + d] = simd::from_float<T>(out[i * packed.v_width + d] / divisor);
            lse[i] = top[i] + std::log(total[i]);
        }
    }
};

template <class T, class X>
void attend(const Call& call) {
    Arena packed_arena, bias_arena;
    const Packed<X> packed(call, packed_arena);
    const int64_t n_heads = call.B * call.Hkv * call.G, n_blocks = (call.S + QUERIES - 1) / QUERIES;
    const int64_t n_panels = packed.n_rows / PANEL, padded = packed.n_rows;
    const bool* is_real = reinterpret_cast<const bool*>(call.is_real);
    float* bias = is_real ? bias_arena.floats(call.B * padded) : nullptr;
    if (bias)
        for (int64_t b = 0; b < call.B; b++)
            for (int64_t j = 0; j < padded; j++) bias[b * padded + j] = j < call.N && is_real[b * call.N + j] ? 0.0f : -INF;
    std::atomic<int64_t> counter{0};
    const double work = double(n_heads) * double(call.S) * double(call.N) * double(call.D + call.Dv);
    const int threads = work < 4e6 ? 1 : int(call.threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < call.B * call.Hkv * n_panels; i++)
            packed.template take<T>(call, i / n_panels, i % n_panels * PANEL);
        static thread_local Arena arena;
        float* memory = arena.floats(Item<X>::n_floats(packed));
        // the last blocks see most
        for (int64_t i = counter++; i < n_heads * n_blocks; i = counter++) {
            const int64_t head = i % n_heads, block = n_blocks - 1 - i / n_heads;
            const float* own = bias ? bias + head / (call.Hkv * call.G) * padded : nullptr;
            Item<X>(call, packed, own, head, block * QUERIES, memory).template run<T>();
        }
    }
}

}  // namespace

extern "C" void prompt_attention(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    attention::with_type(call.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        attend<T, products::FactorOf<T>>(call);
    });
}
