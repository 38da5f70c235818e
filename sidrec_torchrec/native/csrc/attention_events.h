// What a call of code-space attention reads: events, who reads them, and the rows they choose of a query's table.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

#include "codes.h"
#include "kernel.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kGapBuckets = 32;

// floor(log2(gap + 1)), at most kGapBuckets - 1; negative gaps count as 0. Taken from a double's exponent, which the
// compiler makes vectors of.
inline int64_t gap_bucket(int64_t gap) {
  constexpr int64_t kMost = (int64_t{1} << (kGapBuckets - 1)) - 1; // the first gap of the last bucket
  const double more = static_cast<double>(std::clamp<int64_t>(gap, 0, kMost) + 1);
  return (std::bit_cast<int64_t>(more) >> 52) - 1023;
}

// What a call reads, as pointers.
struct Events {
  Layout layout;
  const int64_t* words;
  int64_t num_words;
  const int64_t* begin;
  const int64_t* end;
  bool has_times;
  const int64_t* event_time; // null without times, or without events
  const int64_t* query_time;
  const float* scale; // of each event; null for 1
  int64_t scaled_chunks; // how many of the chunks the scale is for
  int64_t queries;
  int64_t heads;
  bool softmax;

  int64_t values() const { return layout.num_values() + (has_times ? kGapBuckets : 0); }
  int64_t rows() const { return layout.num_slots() + (has_times ? kGapBuckets : 0); }
};

// Summing digits into chunks costs up to 2 * 256 additions per chunk and query, and saves most of an event's: short
// histories do better with chunks of 27 values; so that tables stay in L1, or near it, wide vectors with chunks of 81.
int64_t chunk_limit(const at::Tensor& begin, const at::Tensor& end, int64_t heads) {
  const int64_t queries = begin.size(0);
  const int64_t *from = begin.const_data_ptr<int64_t>(), *to = end.const_data_ptr<int64_t>();
  int64_t events = 0, joined = 0;
  for (int64_t m = 0; m < queries; ++m) {
    events += to[m] - from[m];
    joined += m > 0 && from[m] == from[m - 1] && to[m] == to[m - 1];
  }
  const int64_t lanes = 2 * joined > queries ? kWidest : heads;
  if (events < 300 * queries) return 32;
  return lanes > 4 ? 81 : 256;
}

// The tensors of a call, as kernels take them.
struct Inputs {
  at::Tensor words, begin, end, scores;
  OptionalTensor event_time, query_time, scale;
  at::IntArrayRef radices, digit_words;
  int64_t scaled_digits;

  // Whether a kernel takes them as they come; what it does not, the reference computes, or refuses by name.
  bool taken() const {
    if (!may_run(scores, {at::kFloat}) || scores.dim() != 3 || words.dim() != 2) return false;
    const int64_t N = words.size(0), M = scores.size(0);
    return event_time.has_value() == query_time.has_value() &&
           scores.size(1) == sum(radices) + (event_time ? kGapBuckets : 0) && has_shape(begin, {M}) && has_shape(end, {M}) &&
           has_shape(query_time, {M}) && has_shape(event_time, {N}) && has_shape(scale, {N});
  }

  Inputs ready() const {
    return {sidrec::ready(words),      sidrec::ready(begin),      sidrec::ready(end),
            sidrec::ready(scores),     sidrec::ready(event_time), sidrec::ready(query_time),
            sidrec::ready(scale),      radices,                   digit_words,
            scaled_digits};
  }

  // Pointers to them, once they are ready, with digits joined to chunks of at most ``limit`` values.
  Events events(int64_t limit, bool softmax) const {
    const auto pointer = [](const OptionalTensor& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; };
    Events e{.layout = Layout(radices, digit_words, limit),
             .words = words.const_data_ptr<int64_t>(),
             .num_words = words.size(1),
             .begin = begin.const_data_ptr<int64_t>(),
             .end = end.const_data_ptr<int64_t>(),
             .has_times = event_time.has_value(),
             .event_time = pointer(event_time),
             .query_time = pointer(query_time),
             .scale = scale ? scale->const_data_ptr<float>() : nullptr,
             .scaled_chunks = 0,
             .queries = scores.size(0),
             .heads = scores.size(2),
             .softmax = softmax};
    e.layout.check_words(words);
    if (scale) e.scaled_chunks = e.layout.chunks_of_first(scaled_digits);
    check_ranges();
    return e;
  }

  void check_ranges() const {
    const int64_t *from = begin.const_data_ptr<int64_t>(), *to = end.const_data_ptr<int64_t>();
    for (int64_t m = 0; m < begin.size(0); ++m) {
      TORCH_CHECK(0 <= from[m] && from[m] <= to[m] && to[m] <= words.size(0), "query ", m, " reads events ", from[m],
                  " to ", to[m], " of ", words.size(0));
    }
  }
};

// The rows that the events some queries read choose of a table: a column per chunk, unpacked once for all of the queries,
// and one of time gaps.
class Window {
 public:
  explicit Window(const Events& e) : e_(e) {}

  // Makes the events of query m available, and those of the queries up to ``last`` that begin among them.
  void show(int64_t m, int64_t last) {
    if (e_.begin[m] < begin_ || e_.end[m] > end_) unpack(m, last);
    if (e_.has_times) find_gaps(m);
  }

  // Calls f(first_row, num_rows, values, is_scaled) for each column, with values from event t on; scaled ones come first.
  template <typename F>
  inline void columns(int64_t t, F f) const {
    for (int64_t i = 0; i < e_.layout.num_chunks(); ++i) {
      const Chunk& chunk = e_.layout.chunks()[i];
      f(chunk.first_slot, chunk.radix + 1, values_.data() + i * (end_ - begin_) + (t - begin_), i < e_.scaled_chunks);
    }
    if (e_.has_times) f(e_.layout.num_slots(), kGapBuckets, gaps_.data() + (t - gaps_begin_), false);
  }

  // block[i] = the sum of the rows of a table that event t + i chooses, i < n, the scaled ones times its scale; their sum
  // alone is also kept in ``unscaled``, if that is given.
  template <typename Row>
  inline void add_rows(const Row* table, int64_t t, int64_t n, Row* block, Row* unscaled = nullptr) const {
    Adder<Row> adder(block, n);
    bool scales = e_.scaled_chunks > 0;
    columns(t, [&](int64_t first, int64_t, const uint16_t* value, bool is_scaled) {
      if (scales && !is_scaled) {
        adder.flush();
        scale(t, n, block, unscaled);
        scales = false;
      }
      adder.add(table + first, value);
    });
    adder.flush();
    if (scales) scale(t, n, block, unscaled);
    if (adder.is_first) std::fill(block, block + n, Row{});
  }

 private:
  // Sums columns into a block, four at a time, to write less often.
  template <typename Row>
  struct Adder {
    Row* block;
    int64_t n;
    bool is_first = true;
    int64_t held = 0;
    const Row* rows[4];
    const uint16_t* values[4];

    Adder(Row* block, int64_t n) : block(block), n(n) {}

    inline void add(const Row* row, const uint16_t* value) {
      rows[held] = row;
      values[held] = value;
      if (++held == 4) add_held<4>();
    }

    inline void flush() {
      if (held == 1) add_held<1>();
      if (held == 2) add_held<2>();
      if (held == 3) add_held<3>();
    }

    template <int count>
    inline void add_held() {
      for (int64_t i = 0; i < n; ++i) {
        Row sum = rows[0][values[0][i]];
        for (int c = 1; c < count; ++c) sum += rows[c][values[c][i]];
        if (!is_first) sum += block[i];
        block[i] = sum;
      }
      is_first = false;
      held = 0;
    }
  };

  template <typename Row>
  inline void scale(int64_t t, int64_t n, Row* block, Row* unscaled) const {
    if (unscaled) std::copy(block, block + n, unscaled);
    for (int64_t i = 0; i < n; ++i) block[i] *= e_.scale[t + i];
  }

  void unpack(int64_t m, int64_t last) {
    begin_ = e_.begin[m];
    end_ = e_.end[m];
    for (int64_t i = m + 1; i < last && e_.begin[i] >= begin_ && e_.begin[i] < end_; ++i) end_ = std::max(end_, e_.end[i]);
    values_.resize(e_.layout.num_chunks() * (end_ - begin_));
    e_.layout.unpack(e_.words, e_.num_words, begin_, end_, values_.data(), end_ - begin_);
  }

  // The gaps of the events of query m, where they are not those of the query before.
  void find_gaps(int64_t m) {
    const int64_t time = e_.query_time[m], n = e_.end[m] - e_.begin[m];
    if (time == gaps_time_ && e_.begin[m] == gaps_begin_ && n == static_cast<int64_t>(gaps_.size())) return;
    gaps_time_ = time;
    gaps_begin_ = e_.begin[m];
    gaps_.resize(n);
    const int64_t* event_time = e_.event_time + gaps_begin_;
    for (int64_t i = 0; i < n; ++i) gaps_[i] = gap_bucket(time - event_time[i]);
  }

  const Events& e_;
  int64_t begin_ = 0, end_ = -1;
  int64_t gaps_begin_ = -1, gaps_time_ = 0;
  std::vector<uint16_t> values_, gaps_;
};

} // namespace
} // namespace sidrec
