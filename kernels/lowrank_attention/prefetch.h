// Memory that an item needs next, requested a little at a time in the order of use. By itself the hardware stops at
// page borders, and a burst of requests waits for its own answers.
#pragma once

#include "latents.h"

namespace latents {

constexpr int64_t DOT = 96;  // what a dot product costs on top of its products, in products

// The latents of an item, chunk after chunk: those of its key groups, then those of its value groups.
class Prefetch {
  public:
    // `work`: what is passed to `did` in the course of one chunk, products say.
    Prefetch(const Side& k, const Side& v, int64_t element, int64_t b, int64_t first_head, int64_t span, int64_t start,
         int64_t stop, int64_t work)
        : sides_{&k, &v},
          element_(element),
          b_(b),
          first_head_(first_head),
          span_(span),
          start_(start),
          stop_(stop),
          work_(std::max<int64_t>(1, work)) {
        for (const Side* side : sides_)
            lines_ += span / side->heads * (lines(*side) + (side->plane.bits ? 2 * grid_lines(*side) : 0));
        // the first keys are needed at once
        spend(lines(k));
    }

    void did(int64_t work) {
        // twice the pace up to a lead of half a chunk: keys take half of the memory but sometimes little of the work
        credit_ += work * lines_;
        if (lead_ < lines_ / 2) credit_ += work * lines_, lead_credit_ += work * lines_;
        if (credit_ < work_) return;
        const int64_t n = credit_ / work_;
        credit_ -= n * work_;
        lead_ = lead_credit_ / work_;
        spend(n);
    }

  private:
    // rows of `size` bytes
    struct Block {
        const char* at = nullptr;
        int64_t stride = 0, size = 0, rows = 0;
    };

    int64_t row_bytes(const Side& side) const {
        return side.plane.bits ? side.rank * side.plane.bits / 8 : side.rank * element_;
    }
    int64_t lines(const Side& side) const { return CHUNK * ((row_bytes(side) + 63) / 64); }
    static int64_t grid_lines(const Side& side) {
        return side.plane.scale_row == side.plane.n_groups ? (CHUNK * side.plane.n_groups * 2 + 63) / 64 : CHUNK;
    }

    void spend(int64_t n) {
        const char* at = at_;
        for (; n > 0; n--, at += 64) {
            if (at >= end_) {
                if (!next_row()) return;
                at = at_;
            }
            __builtin_prefetch(at, 0, 2);
        }
        at_ = at;
    }

    __attribute__((noinline)) bool next_row() {
        if (++row_ >= block_.rows && !next()) return false;
        at_ = block_.at + row_ * block_.stride, end_ = at_ + block_.size;
        return true;
    }

    // Goes on to the next block: codes, scales and zeros of each group of keys, then of values, of each chunk.
    bool next() {
        if (start_ >= stop_) return false;
        row_ = 0;
        const Side& side = *sides_[side_];
        const packed_rows::Plane& p = side.plane;
        const int64_t group = first_head_ / side.heads + group_, n = std::min<int64_t>(CHUNK, stop_ - start_),
                      bytes = p.bits ? 2 : element_;
        const int64_t part = part_;
        if (part == 0) {
            block_ = block(p.codes + (b_ * p.batch + group * p.head + start_ * p.row) * bytes, p.row * bytes,
                           row_bytes(side), n);
        } else if (part == 1) {
            block_ = block(p.scale + (b_ * p.scale_batch + group * p.scale_head + start_ * p.scale_row) * 2,
                           p.scale_row * 2, p.n_groups * 2, n);
        } else {
            block_ = block(p.zero + (b_ * p.zero_batch + group * p.zero_head + start_ * p.zero_row) * 2, p.zero_row * 2,
                           p.n_groups * 2, n);
        }
        if (++part_ < (p.bits ? 3 : 1)) return true;
        part_ = 0;
        if (++group_ < span_ / side.heads) return true;
        group_ = 0;
        if (++side_ < 2) return true;
        side_ = 0, start_ += CHUNK;
        return true;
    }
    static Block block(int64_t at, int64_t stride, int64_t size, int64_t rows) {
        // rows without gaps are one long row
        if (stride == size) size *= rows, rows = 1;
        return {reinterpret_cast<const char*>(at), stride, size, rows};
    }

    const Side* sides_[2];
    int64_t element_, b_, first_head_, span_, start_, stop_, work_, lines_ = 0, credit_ = 0, lead_ = 0,
                                                                    lead_credit_ = 0;
    int64_t side_ = 0, group_ = 0, part_ = 0, row_ = 0;
    const char *at_ = nullptr, *end_ = nullptr;
    Block block_;
};

}  // namespace latents
