// Tables of a query by chunk value: made of scores of digit values, and reduced to masses of digit values. Behind a chunk's
// values stands one row more, for events without any: zero where scores are read, and left out of the masses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention_events.h"

namespace sidrec {
namespace {

// What is computed as one vector: some heads of one query, or all heads of some queries that read the same.
struct Lanes {
  int64_t query, queries;
  int64_t first_head, heads;

  int64_t count() const { return queries * heads; }

  // Moves row v of values [M, V, H] to a vector or back: copy(float of the vector, float of the row, how many).
  template <typename Values, typename Copy>
  void row(const Events& e, Values* values_MVH, int64_t v, Copy copy) const {
    Values* from = values_MVH + (query * e.values() + v) * e.heads + first_head;
    for (int64_t i = 0; i < queries; ++i, from += e.values() * e.heads) {
      if (heads == 4) { // most often: a size that the compiler knows
        copy(i * 4, from, 4);
      } else {
        copy(i * heads, from, heads);
      }
    }
  }
};

// Cuts the work into vectors of at most ``width`` lanes; the same whatever the number of threads, so that results are too.
inline std::vector<Lanes> cut(const Events& e, int64_t width, bool join_queries) {
  std::vector<Lanes> cuts;
  const auto same = [&](int64_t a, int64_t b) {
    return e.begin[a] == e.begin[b] && e.end[a] == e.end[b] && (!e.has_times || e.query_time[a] == e.query_time[b]);
  };
  for (int64_t m = 0, queries; m < e.queries; m += queries) {
    const int64_t most = join_queries ? std::max<int64_t>(1, width / std::max<int64_t>(1, e.heads)) : 1;
    for (queries = 1; queries < most && m + queries < e.queries && same(m, m + queries);) ++queries;
    for (int64_t head = 0; head < e.heads; head += width) {
      cuts.push_back({m, queries, head, std::min(width, e.heads - head)});
    }
  }
  return cuts;
}

// The table of some lanes from scores of digit values [M, V, H]: a chunk's value scores the sum of its digits.
template <typename Float>
void expand(const Events& e, const float* values_MVH, const Lanes& lanes, Float* table, int64_t stride) {
  const auto load = [&](int64_t v) {
    Float x{};
    lanes.row(e, values_MVH, v, [&](int64_t lane, const float* row, int64_t heads) {
      std::memcpy(reinterpret_cast<float*>(&x) + lane, row, heads * sizeof(float));
    });
    return x;
  };
  static thread_local std::vector<Float> own; // of a digit
  int64_t value = 0;                          // the first of the next digit
  for (const Chunk& chunk : e.layout.chunks()) {
    Float* rows = table + chunk.first_slot * stride;
    rows[0] = rows[chunk.radix * stride] = Float{};
    int64_t n = 1;
    for (int64_t j = 0; j < chunk.num_digits; ++j) {
      const int64_t radix = e.layout.radix(chunk.first_digit + j);
      own.resize(radix);
      for (int64_t v = 0; v < radix; ++v) own[v] = load(value + v);
      for (int64_t k = n - 1; k >= 0; --k) { // from the back: in place
        const Float base = rows[k * stride];
        for (int64_t v = radix - 1; v >= 0; --v) rows[(k * radix + v) * stride] = base + own[v];
      }
      n *= radix;
      value += radix;
    }
  }
  for (int64_t i = 0; value + i < e.values(); ++i) table[(e.layout.num_slots() + i) * stride] = load(value + i);
}

// The reverse: sums by digit value [M, V, H] of a histogram by chunk value, which is used up.
template <typename Float>
void marginals(const Events& e, Float* histogram, const Lanes& lanes, float* values_MVH) {
  const auto store = [&](int64_t v, Float x) {
    lanes.row(e, values_MVH, v, [&](int64_t lane, float* row, int64_t heads) {
      std::memcpy(row, reinterpret_cast<float*>(&x) + lane, heads * sizeof(float));
    });
  };
  int64_t value = e.layout.num_values();
  for (int64_t i = 0; value + i < e.values(); ++i) store(value + i, histogram[e.layout.num_slots() + i]);
  for (int64_t f = e.layout.num_chunks() - 1; f >= 0; --f) {
    const Chunk& chunk = e.layout.chunks()[f];
    Float* rows = histogram + chunk.first_slot;
    int64_t n = chunk.radix;
    for (int64_t j = chunk.num_digits - 1; j >= 0; --j) {
      const int64_t radix = e.layout.radix(chunk.first_digit + j);
      n /= radix;
      value -= radix;
      for (int64_t v = 0; v < radix; ++v) {
        Float sum{};
        for (int64_t k = 0; k < n; ++k) sum += rows[k * radix + v];
        store(value + v, sum);
      }
      for (int64_t k = 0; k < n; ++k) { // what is left when this digit is summed out
        Float sum{};
        for (int64_t v = 0; v < radix; ++v) sum += rows[k * radix + v];
        rows[k] = sum;
      }
    }
  }
}

// Sums of weights by row of a table. In a column of few rows neighbouring events often meet in one, and each sum would wait
// for the one before: such columns have copies of their rows, which take turns.
template <typename Float>
class Histogram {
 public:
  // All zero; the sums of a thread's calls share memory.
  explicit Histogram(const Events& e) : num_rows_(e.rows()) {
    int64_t copies = e.has_times ? (kCopies - 1) * kGapBuckets : 0;
    for (const Chunk& chunk : e.layout.chunks()) copies += has_copies(chunk.radix + 1) ? (kCopies - 1) * (chunk.radix + 1) : 0;
    static thread_local std::vector<Float> memory;
    memory.assign(num_rows_ + copies, Float{});
    rows_ = memory.data();
    end_ = rows_ + memory.size();
  }

  // Adds the weights of events t + i, i < n, to their rows, and to those that are scaled the scaled ones; n is a multiple of
  // kCopies, or the last events'.
  inline void add(const Window& window, int64_t t, int64_t n, const Float* weights, const Float* scaled) {
    Float* copies = rows_ + num_rows_;
    window.columns(t, [&](int64_t first, int64_t num_rows, const uint16_t* value, bool is_scaled) {
      Float* const own = has_copies(num_rows) ? copies : nullptr;
      if (own) copies += (kCopies - 1) * num_rows;
      add_column(rows_ + first, own, num_rows, value, n, is_scaled ? scaled : weights);
    });
  }

  void scale(Float factor) {
    for (Float* row = rows_; row < end_; ++row) *row *= factor;
  }

  // The sums, of all copies; ``t`` is any event of the window.
  Float* sums(const Window& window, int64_t t) {
    Float* copies = rows_ + num_rows_;
    window.columns(t, [&](int64_t first, int64_t num_rows, const uint16_t*, bool) {
      for (int64_t copy = 1; has_copies(num_rows) && copy < kCopies; ++copy) {
        for (int64_t row = 0; row < num_rows; ++row) rows_[first + row] += *copies++;
      }
    });
    return rows_;
  }

 private:
  static bool has_copies(int64_t num_rows) { return num_rows <= kFew || num_rows == kGapBuckets; }

  static constexpr int64_t kFew = 8, kCopies = 4;

  static inline void add_column(Float* rows, Float* copies, int64_t num_rows, const uint16_t* value, int64_t n,
                                const Float* weights) {
    if (!copies) {
      for (int64_t i = 0; i < n; ++i) rows[value[i]] += weights[i];
      return;
    }
    Float* const turns[kCopies] = {rows, copies, copies + num_rows, copies + 2 * num_rows};
    int64_t i = 0;
    for (; i + kCopies <= n; i += kCopies) {
      for (int64_t turn = 0; turn < kCopies; ++turn) turns[turn][value[i + turn]] += weights[i + turn];
    }
    for (; i < n; ++i) rows[value[i]] += weights[i];
  }

  int64_t num_rows_;
  Float *rows_, *end_;
};

} // namespace
} // namespace sidrec
