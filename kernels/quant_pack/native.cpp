// quant_pack on the CPU, bit for bit what the reference computes: the order and rounding of every operation matter.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "simd.h"

namespace {

using simd::f16;
using simd::LANES;
using simd::splat;
using simd::vfloat;

struct Call {
    int64_t x, batch, head, row;   // address, strides in elements
    int64_t codes, scale, zero;    // contiguous
    int64_t dtype, B, H, n, D, bits, per_channel, group, threads;
};

constexpr float HALF_MAX = 65504.0f;

inline float to_half_range(float x) { return x < -HALF_MAX ? -HALF_MAX : x > HALF_MAX ? HALF_MAX : x; }

// Scale and zero point of one group, as float16 and as the floats the codes are computed with.
struct Grid {
    f16 scale, zero;
    float step, offset;

    Grid(float low, float high, float centre) {
        zero = simd::from_float<f16>(to_half_range((low + high) / 2));
        offset = simd::to_float(zero);
        const float above = high - offset, below = offset - low;
        // NaN wins, as in torch.maximum
        const float extent = above != above || above > below ? above : below;
        scale = simd::from_float<f16>(to_half_range(extent / centre * (1 + 0x1p-10f)));
        step = simd::to_float(scale) > 0 ? simd::to_float(scale) : 1.0f;
    }
};

// The same for LANES groups, none with NaN; the scale and zero point as they read back from float16.
struct Grids {
    vfloat step, offset;

    Grids(vfloat low, vfloat high, float centre, f16* scale, f16* zero) {
        const vfloat limit = splat(HALF_MAX);
        simd::store(zero, simd::min(limit, simd::max(-limit, (low + high) / 2)));
        offset = simd::load(zero);
        const vfloat extent = simd::max(high - offset, offset - low);
        simd::store(scale, simd::min(limit, simd::max(-limit, extent / centre * (1 + 0x1p-10f))));
        const vfloat read = simd::load(scale);
        step = simd::select(read > splat(0.0f), read, splat(1.0f));
    }
};

// (x - offset) / step, correctly rounded; `inverse` is the rounded 1 / step.
inline vfloat divide(vfloat x, [[maybe_unused]] vfloat step, [[maybe_unused]] vfloat inverse) {
#if defined(__FMA__) || defined(__AVX512F__)
    // quotient and one exact correction (Markstein): 3 operations where a division takes 16 cycles
    const vfloat quotient = x * inverse;
    return simd::fma(simd::fma(-quotient, step, x), inverse, quotient);
#else
    return x / step;
#endif
}

// Codes of D channels, 16 bits each. `width` is D rounded up to whole registers; the arrays have that size.
struct Quantiser {
    float centre, last;

    void vector(const float* x, const float* step, const float* inverse, const float* offset, int64_t width, uint16_t* codes) const {
        for (int64_t d = 0; d < width; d += LANES) {
            const vfloat centred = simd::load(x + d) - simd::load(offset + d);
            const vfloat y = divide(centred, simd::load(step + d), simd::load(inverse + d)) + splat(centre);
            // adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits
            const vfloat rounded = simd::min(splat(last), simd::max(y, splat(0.0f))) + splat(0x1.8p23f);
            simd::store_low_halves(codes + d, simd::bit_cast<simd::vint>(rounded));
        }
    }

    // the same for groups with NaN or infinities, where the correction of `divide` would lose them
    void careful(const float* x, const float* step, const float* offset, int64_t D, uint16_t* codes) const {
        for (int64_t d = 0; d < D; d++) {
            const float y = std::nearbyint((x[d] - offset[d]) / step[d] + centre);
            codes[d] = y != y ? 0 : uint16_t(y < 0 ? 0 : y > last ? last : y);
        }
    }
};

// Fields of `WIDTH` bits, `shift` bits up in the codes, to n_words words.
template <int WIDTH>
void pack_plane(const uint16_t* codes, int shift, int64_t n_words, uint16_t* words) {
    constexpr int MASK = (1 << WIDTH) - 1;
    for (int64_t j = 0; j < n_words; j++) {
        uint16_t word = 0;
#pragma GCC unroll 16
        for (int f = 0; f < 16 / WIDTH; f++) word = uint16_t(word | ((codes[f * n_words + j] >> shift) & MASK) << (f * WIDTH));
        words[j] = word;
    }
}

void pack(int64_t bits, const uint16_t* codes, int64_t D, uint16_t* words) {
    switch (bits) {
        case 8: return pack_plane<8>(codes, 0, D / 2, words);
        case 4: return pack_plane<4>(codes, 0, D / 4, words);
        case 2: return pack_plane<2>(codes, 0, D / 8, words);
        default: pack_plane<2>(codes, 0, D / 8, words), pack_plane<1>(codes, 2, D / 16, words + D / 8);
    }
}

// One block of rows: widened input, the grid of each channel, and codes, all padded to whole registers.
struct Block {
    int64_t D, width;
    std::unique_ptr<float[]> memory;
    float *low, *high, *step, *inverse, *offset, *rows;
    std::unique_ptr<uint16_t[]> codes;

    Block(int64_t channels, int64_t n_rows)
        : D(channels),
          width((channels + LANES - 1) / LANES * LANES),
          memory(new float[(5 + n_rows) * width]()),
          codes(new uint16_t[width]()) {
        low = memory.get(), high = low + width, step = high + width, inverse = step + width, offset = inverse + width;
        rows = offset + width;
        std::fill(step, inverse + width, 1.0f);
    }

    template <class T>
    void widen(const T* from, int64_t stride, int64_t n) {
        for (int64_t t = 0; t < n; t++) {
            int64_t d = 0;
            for (; d + LANES <= D; d += LANES) simd::store(rows + t * width + d, simd::load(from + t * stride + d));
            for (; d < D; d++) rows[t * width + d] = simd::to_float(from[t * stride + d]);
        }
    }

    // x in the order that keeps a NaN of either side
    static float lower(float a, float b) { return a != a || a < b ? a : b; }
    static float higher(float a, float b) { return a != a || a > b ? a : b; }
};

void set_grid(Block& block, int64_t d, const Grid& grid) {
    block.step[d] = grid.step, block.inverse[d] = 1.0f / grid.step, block.offset[d] = grid.offset;
}

// Is any input NaN or infinite? x - x is 0 for every other number.
bool special(const float* x, int64_t n) {
    vfloat sum = {};
    for (int64_t i = 0; i < n; i += LANES) sum += simd::load(x + i) - simd::load(x + i);
    const float total = simd::sum(sum);
    return total != 0.0f;
}

template <class T>
void pack_channels(const Call& call, const Quantiser& quantiser, Block& block, int64_t bh, int64_t i) {
    const T* x = reinterpret_cast<const T*>(call.x) + bh / call.H * call.batch + bh % call.H * call.head + i * call.group * call.row;
    block.widen(x, call.row, call.group);
    vfloat finite = {};
    for (int64_t d = 0; d < block.width; d += LANES) {
        vfloat low = simd::load(block.rows + d), high = low;
        for (int64_t t = 0; t < call.group; t++) {
            const vfloat row = simd::load(block.rows + t * block.width + d);
            low = simd::min(low, row), high = simd::max(high, row);
            finite += row - row;
        }
        simd::store(block.low + d, low);
        simd::store(block.high + d, high);
    }
    const bool careful = simd::sum(finite) != 0.0f;
    if (careful)
        for (int64_t t = 0; t < call.group; t++)
            for (int64_t d = 0; d < block.D; d++) {
                block.low[d] = Block::lower(t ? block.low[d] : block.rows[d], block.rows[t * block.width + d]);
                block.high[d] = Block::higher(t ? block.high[d] : block.rows[d], block.rows[t * block.width + d]);
            }
    const int64_t at = (bh * (call.n / call.group) + i) * call.D;
    f16 *scale = reinterpret_cast<f16*>(call.scale) + at, *zero = reinterpret_cast<f16*>(call.zero) + at;
    int64_t d = 0;
    for (; !careful && d + LANES <= call.D; d += LANES) {
        const Grids grids(simd::load(block.low + d), simd::load(block.high + d), quantiser.centre, scale + d, zero + d);
        simd::store(block.step + d, grids.step);
        simd::store(block.inverse + d, splat(1.0f) / grids.step);
        simd::store(block.offset + d, grids.offset);
    }
    for (; d < call.D; d++) {
        const Grid grid(block.low[d], block.high[d], quantiser.centre);
        scale[d] = grid.scale, zero[d] = grid.zero;
        set_grid(block, d, grid);
    }
    const int64_t W = call.D * call.bits / 16;
    uint16_t* words = reinterpret_cast<uint16_t*>(call.codes) + (bh * call.n + i * call.group) * W;
    for (int64_t t = 0; t < call.group; t++) {
        const float* row = block.rows + t * block.width;
        if (careful) {
            quantiser.careful(row, block.step, block.offset, call.D, block.codes.get());
        } else {
            quantiser.vector(row, block.step, block.inverse, block.offset, block.width, block.codes.get());
        }
        pack(call.bits, block.codes.get(), call.D, words + t * W);
    }
}

template <class T>
void pack_token(const Call& call, const Quantiser& quantiser, Block& block, int64_t bh, int64_t t) {
    const T* x = reinterpret_cast<const T*>(call.x) + bh / call.H * call.batch + bh % call.H * call.head + t * call.row;
    block.widen(x, call.row, 1);
    const bool careful = special(block.rows, block.width);
    const int64_t groups = call.D / call.group, at = (bh * call.n + t) * groups;
    f16 *scale = reinterpret_cast<f16*>(call.scale) + at, *zero = reinterpret_cast<f16*>(call.zero) + at;
    for (int64_t g = 0; g < groups; g++) {
        const float* row = block.rows + g * call.group;
        float low = row[0], high = row[0];
        if (careful || call.group % LANES) {
            for (int64_t d = 1; d < call.group; d++) low = Block::lower(low, row[d]), high = Block::higher(high, row[d]);
        } else {
            vfloat lows = simd::load(row), highs = lows;
            for (int64_t d = LANES; d < call.group; d += LANES)
                lows = simd::min(lows, simd::load(row + d)), highs = simd::max(highs, simd::load(row + d));
            low = -simd::largest(-lows), high = simd::largest(highs);
        }
        const Grid grid(low, high, quantiser.centre);
        scale[g] = grid.scale, zero[g] = grid.zero;
        std::fill(block.step + g * call.group, block.step + (g + 1) * call.group, grid.step);
        std::fill(block.inverse + g * call.group, block.inverse + (g + 1) * call.group, 1.0f / grid.step);
        std::fill(block.offset + g * call.group, block.offset + (g + 1) * call.group, grid.offset);
    }
    if (careful) {
        quantiser.careful(block.rows, block.step, block.offset, call.D, block.codes.get());
    } else {
        quantiser.vector(block.rows, block.step, block.inverse, block.offset, block.width, block.codes.get());
    }
    const int64_t W = call.D * call.bits / 16;
    pack(call.bits, block.codes.get(), call.D, reinterpret_cast<uint16_t*>(call.codes) + (bh * call.n + t) * W);
}

template <class T>
void run(const Call& call) {
    const float last = float((1 << call.bits) - 1);
    const Quantiser quantiser{last / 2, last};
    // an item is 32 rows or one block of a scale
    const int64_t item_rows = call.per_channel ? call.group : 32, per_head = (call.n + item_rows - 1) / item_rows;
    const int64_t items = call.B * call.H * per_head;
    const auto run_items = [&](int64_t from, int64_t to) {
        Block block(call.D, call.per_channel ? call.group : 1);
        for (int64_t item = from; item < to; item++) {
            const int64_t bh = item / per_head, i = item % per_head;
            if (call.per_channel) {
                pack_channels<T>(call, quantiser, block, bh, i);
                continue;
            }
            const int64_t stop = std::min(call.n, (i + 1) * item_rows);
            for (int64_t t = i * item_rows; t < stop; t++) pack_token<T>(call, quantiser, block, bh, t);
        }
    };
    // about 20 us of work: below it waking threads costs more than it gives
    const int threads = items * item_rows * call.D < 50000 ? 1 : int(std::min<int64_t>(call.threads, items));
    if (threads <= 1) return run_items(0, items);
    const int64_t share = std::max<int64_t>(1, items / (8 * threads)), shares = (items + share - 1) / share;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < shares; i++) run_items(i * share, std::min(items, (i + 1) * share));
}

}  // namespace

extern "C" void quant_pack(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    if (call.dtype == 1) {
        run<simd::bf16>(call);
    } else if (call.dtype == 2) {
        run<f16>(call);
    } else {
        run<float>(call);
    }
}
