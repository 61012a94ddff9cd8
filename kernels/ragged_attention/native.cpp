// ragged_attention on the CPU: to the formats a page is a batch row of one KV head. Chunks of rows are scored and added page
// by page; softmax and what a format sets up take place once per chunk and item. Dense rows of all heads may follow.
#include "../sparse_attention/sparse_item.h"

#if defined(__AVX512VNNI__)
#include "../quant_attention/integer_rows.h"
#endif

namespace {

using attention::CHUNK;
using attention::State;
using sparse_item::Item;
using sparse_rows::Rows;
using sparse_rows::Side;

// Which rows are whose; strides in elements.
struct Pages {
    int64_t table, table_batch, table_head, table_page;  // int32
    int64_t lengths, lengths_batch, lengths_head;        // int32
    int64_t n_entries, n_pages, page;                    // of a head, of the pool, rows of a page

    int64_t length(int64_t b, int64_t h) const {
        const int32_t n = reinterpret_cast<const int32_t*>(lengths)[b * lengths_batch + h * lengths_head];
        return std::clamp<int64_t>(n, 0, n_entries * page);
    }
};

struct Call {
    attention::Queries queries;
    Side k, v;
    Pages pages;
    attention::Tail tail;  // without a number of rows before it, which every head has of its own
};

// The pages of one head.
struct Table {
    const int32_t* first;
    int64_t stride, page;

    Table(const Pages& pages, int64_t b, int64_t h)
        : first(reinterpret_cast<const int32_t*>(pages.table) + b * pages.table_batch + h * pages.table_head),
          stride(pages.table_page),
          page(pages.page) {}

    int64_t operator[](int64_t i) const { return first[i * stride]; }

    // Calls f(page, row of the page, count, at) for the parts of rows `[start, start + n)`; at: where a part begins.
    template <class F>
    void parts(int64_t start, int n, F f) const {
        for (int at = 0, count; at < n; at += count) {
            const int64_t row = (start + at) % page;
            count = int(std::min<int64_t>(page - row, n - at));
            f((*this)[(start + at) / page], row, count, at);
        }
    }
};

// Memory of rows `[row, stop)` of one side, requested a few rows at a time.
class Prefetch {
  public:
    Prefetch(const Side& side, int64_t element, const Table& table, int64_t row, int64_t stop)
        : table_(table), entry_(row / table.page), inside_(row % table.page), left_(stop - row) {
        const packed_rows::Plane& p = side.plane;
        const int64_t bytes = p.bits ? 2 : element;
        add(p.codes, p.batch * bytes, p.row * bytes);
        if (p.bits) add(p.scale, p.scale_batch * 2, p.scale_row * 2), add(p.zero, p.zero_batch * 2, p.zero_row * 2);
        if (side.layout != sparse_rows::ALL) add(side.places, side.places_batch, side.places_row);
    }

    void fetch(int, int n) {
        while (n > 0 && left_ > 0) {
            const int64_t count = std::min({int64_t(n), table_.page - inside_, left_}), page = table_[entry_];
            for (int i = 0; i < n_fields_; i++) {
                const Field& field = fields_[i];
                const int64_t from = field.first + page * field.page + inside_ * field.row, stop = from + count * field.row;
                // a line goes with the row in which it begins, the first one of a page with its first row
                for (int64_t line = (inside_ ? from + LINE - 1 : from) / LINE * LINE; line < stop; line += LINE)
                    __builtin_prefetch(reinterpret_cast<const char*>(line), 0, 2);
            }
            n -= int(count), left_ -= count, inside_ += count;
            if (inside_ == table_.page) inside_ = 0, entry_++;
        }
    }

  private:
    static constexpr int64_t LINE = 64;

    struct Field {
        int64_t first, page, row;  // address, bytes
    };

    void add(int64_t first, int64_t page, int64_t row) { fields_[n_fields_++] = {first, page, row}; }

    const Table table_;
    int64_t entry_, inside_, left_;
    Field fields_[4];
    int n_fields_ = 0;
};

// One item: a block of queries on its way through rows of one head.
template <class T>
class Run {
  public:
    Run(const Call& call, const attention::Partition& part, State& state, int64_t b, int64_t h)
        : call_(call), part_(part), table_(call.pages, b, h), state_(state), item_(state, call.queries) {
        item_.begin<T>(call.queries, call.k, call.v, b, h);
#if defined(__AVX512VNNI__)
        const Rows k = keys_of(0), v = values_of(0);
        keys_are_integers_ = of_codes(call.k) && integer_rows::keys_suit(k.codes);
        values_are_integers_ = of_codes(call.v) && integer_rows::values_suit(v.codes);
        if (keys_are_integers_) integer_rows::prepare_all(state, call.queries, call.k.plane, prepared_);
#endif
    }

    void add(int64_t start, int64_t stop) {
        if (!state_.turn->foreseen()) prefetch(call_.k, table_, start, stop).fetch(0, CHUNK);
        for (int64_t first = start; first < stop; first += CHUNK) {
            const int n = int(std::min<int64_t>(CHUNK, stop - first));
            Prefetch values_ahead = prefetch(call_.v, table_, first, stop);
            Prefetch keys_ahead = first + n < stop ? prefetch(call_.k, table_, first + n, stop) : next_item();
            table_.parts(first, n, [&](int64_t page, int64_t row, int count, int at) {
                score(keys_of(page), row, count, at, values_ahead);
            });
            attention::weigh(item_.outputs(call_.v), call_.queries, nullptr, n);
            add_values(first, n, keys_ahead);
            // the next item may begin with more rows than this one ended with
            keys_ahead.fetch(0, CHUNK);
        }
        item_.end<T>(call_.v, call_.queries.Dv);
#if defined(__AVX512VNNI__)
        if (values_are_integers_) integer_rows::restore_channels(state_, call_.v.plane, call_.queries.Dv);
#endif
    }

  private:
    static bool of_codes(const Side& side) { return side.plane.bits && side.layout == sparse_rows::ALL; }

    Prefetch prefetch(const Side& side, const Table& table, int64_t first, int64_t stop) const {
        return {side, sizeof(T), table, first, std::min<int64_t>(stop, first + CHUNK)};
    }

    // The first keys of what this thread does next.
    Prefetch next_item() const {
        const int64_t i = state_.turn->next(), n_heads = call_.queries.Hkv;
        if (i >= part_.n_items) return prefetch(call_.k, table_, 0, 0);
        const attention::Partition::Item next = part_.item(i);
        const int64_t b = next.head / n_heads, h = next.head % n_heads;
        return prefetch(call_.k, Table(call_.pages, b, h), next.start, std::min(next.stop, call_.pages.length(b, h)));
    }

    Rows keys_of(int64_t page) const { return page_of(call_.k, page, call_.queries.D); }
    Rows values_of(int64_t page) const { return page_of(call_.v, page, call_.queries.Dv); }

    Rows page_of(const Side& side, int64_t page, int64_t D) const {
        const packed_rows::Plane& p = side.plane;
        // memory goes on behind a page, up to the end of the pool
        const int64_t behind = p.row ? (call_.pages.n_pages - 1 - page) * p.batch / p.row : 0;
        return {side, page, 0, D, table_.page + behind};
    }

    void score(const Rows& k, int64_t row, int count, int at, Prefetch& prefetch) {
#if defined(__AVX512VNNI__)
        if (keys_are_integers_)
            return integer_rows::with_format(call_.k.plane, call_.queries, [&](auto bits, auto limbs) {
                integer_rows::score<decltype(bits)::value, decltype(limbs)::value>(sparse_item::later(state_, at), k.codes, row,
                                                                                   count, &prepared_, prefetch);
            });
#endif
        sparse_item::score<T>(item_, k, row, count, at, prefetch);
    }

    void add_values(int64_t first, int n, Prefetch& prefetch) {
#if defined(__AVX512VNNI__)
        if (values_are_integers_)
            return integer_rows::with_format(call_.v.plane, call_.queries, [&](auto bits, auto limbs) {
                integer_rows::Values values(state_, n);
                table_.parts(first, n, [&](int64_t page, int64_t row, int count, int at) {
                    prefetch.fetch(at, count);
                    values.read<decltype(bits)::value>(values_of(page).codes, row, count, at);
                });
                values.add<decltype(bits)::value, decltype(limbs)::value>(state_, values_of(0).codes);
            });
#endif
        table_.parts(first, n, [&](int64_t page, int64_t row, int count, int at) {
            sparse_item::add_values<T>(item_, values_of(page), row, count, at, prefetch);
        });
    }

    const Call& call_;
    const attention::Partition& part_;
    const Table table_;
    State& state_;
    Item item_;
#if defined(__AVX512VNNI__)
    bool keys_are_integers_, values_are_integers_;
    integer_rows::Prepared prepared_;
#endif
};

}  // namespace

extern "C" void ragged_attention(const char* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    const attention::Queries& queries = call.queries;
    const attention::Partition part(
        queries, [&](int64_t head) { return call.pages.length(head / queries.Hkv, head % queries.Hkv) + call.tail.n_rows; });
    attention::with_type(queries.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        attention::attend(queries, part, Item::floats(queries), [&](State& state, int64_t b, int64_t h, int64_t start, int64_t stop) {
            const int64_t length = call.pages.length(b, h);
            attention::Tail tail = call.tail;
            attention::Queries masked = queries;
            // the mask is about the tail alone
            tail.n_packed = length, masked.mask -= queries.mask ? length : 0;
            tail.add<T>(state, masked, b, h, start, stop,
                        [&](int64_t first, int64_t last) { Run<T>(call, part, state, b, h).add(first, last); });
        });
    });
}
