// Attention over packed SIDs on CPU; code_attention.py says what it computes.
//
// Per query, the scores of digit values are summed into one small table per chunk of a few digits (243 rows for 5 trits),
// which stays in L1; an event's score is a sum of one row per chunk, and its weight is added to one row per chunk of a
// histogram of the same shape. Heads are the vector dimension.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "codes.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kGapBuckets = 32;
constexpr int64_t kBlock = 128; // events whose scores are held at a time

// floor(log2(gap + 1)), at most kGapBuckets - 1; negative gaps count as 0.
inline int64_t gap_bucket(int64_t gap) {
  if (gap <= 0) return 0;
  return std::min<int64_t>(63 - __builtin_clzll(static_cast<uint64_t>(gap) + 1), kGapBuckets - 1);
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
  int64_t queries;
  int64_t heads;
  bool softmax;

  int64_t values() const { return layout.num_values() + (has_times ? kGapBuckets : 0); }
  int64_t rows() const { return layout.num_rows() + (has_times ? kGapBuckets : 0); }
};

// Summing digits into chunks costs up to 2 * 256 additions per chunk and query, and saves most of an event's: short
// histories do better with chunks of 27 values.
int64_t chunk_limit(const at::Tensor& begin, const at::Tensor& end) {
  const int64_t queries = begin.size(0);
  int64_t events = 0;
  for (int64_t m = 0; m < queries; ++m) events += end.const_data_ptr<int64_t>()[m] - begin.const_data_ptr<int64_t>()[m];
  return events < 300 * queries ? 32 : 256;
}

Events check(const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
             const std::optional<at::Tensor>& event_time, const std::optional<at::Tensor>& query_time,
             at::IntArrayRef radices, at::IntArrayRef digit_words, bool softmax) {
  const auto pointer = [](const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; };
  Events events{Layout(radices, digit_words, chunk_limit(begin, end)),
                words.const_data_ptr<int64_t>(),
                words.size(1),
                begin.const_data_ptr<int64_t>(),
                end.const_data_ptr<int64_t>(),
                event_time.has_value(),
                pointer(event_time),
                pointer(query_time),
                scores.size(0),
                scores.size(2),
                softmax};
  events.layout.check_words(words);
  TORCH_CHECK(scores.size(1) == events.values(), "scores of ", scores.size(1), " values, expected ", events.values());
  for (int64_t m = 0; m < events.queries; ++m) {
    TORCH_CHECK(0 <= events.begin[m] && events.begin[m] <= events.end[m] && events.end[m] <= words.size(0), "query ", m,
                " reads events ", events.begin[m], " to ", events.end[m], " of ", words.size(0));
  }
  return events;
}

// The table of one group of heads from scores of digit values [V, H]: a chunk's value scores the sum of its digits.
template <typename Float>
void expand(const Events& e, const float* values_VH, int64_t first_head, int64_t heads, Float* table, int64_t stride) {
  const auto load = [&](int64_t v) {
    Float x{};
    std::memcpy(&x, values_VH + v * e.heads + first_head, heads * sizeof(float));
    return x;
  };
  int64_t value = 0; // the first of the next digit
  for (const Chunk& chunk : e.layout.chunks()) {
    Float* rows = table + chunk.first_row * stride;
    rows[0] = Float{};
    int64_t n = 1;
    for (int64_t j = 0; j < chunk.num_digits; ++j) {
      const int64_t radix = e.layout.radix(chunk.first_digit + j);
      for (int64_t k = n - 1; k >= 0; --k) { // from the back: in place
        const Float base = rows[k * stride];
        for (int64_t v = radix - 1; v >= 0; --v) rows[(k * radix + v) * stride] = base + load(value + v);
      }
      n *= radix;
      value += radix;
    }
  }
  for (int64_t i = 0; value + i < e.values(); ++i) table[(e.layout.num_rows() + i) * stride] = load(value + i);
}

// The reverse: sums by digit value [V, H] of a histogram by chunk value, which is used up.
template <typename Float>
void marginals(const Events& e, Float* histogram, int64_t first_head, int64_t heads, float* values_VH) {
  const auto store = [&](int64_t v, Float x) {
    std::memcpy(values_VH + v * e.heads + first_head, &x, heads * sizeof(float));
  };
  int64_t value = e.layout.num_values();
  for (int64_t i = 0; value + i < e.values(); ++i) store(value + i, histogram[e.layout.num_rows() + i]);
  for (int64_t f = e.layout.num_chunks() - 1; f >= 0; --f) {
    const Chunk& chunk = e.layout.chunks()[f];
    Float* rows = histogram + chunk.first_row;
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

// The chunk values of the events some queries read, unpacked once for all of them.
class Window {
 public:
  explicit Window(const Events& e) : e_(e) {}

  // Makes the events of query m available, and those of the queries up to ``last`` that begin among them.
  void show(int64_t m, int64_t last) {
    if (e_.begin[m] >= begin_ && e_.end[m] <= end_) return;
    begin_ = e_.begin[m];
    end_ = e_.end[m];
    for (int64_t i = m + 1; i < last && e_.begin[i] >= begin_ && e_.begin[i] < end_; ++i) end_ = std::max(end_, e_.end[i]);
    values_.resize(e_.layout.num_chunks() * (end_ - begin_));
    e_.layout.unpack(e_.words, e_.num_words, begin_, end_, values_.data(), end_ - begin_);
  }

  // Calls f(first_row, values) for each chunk of events t .. t + n, and for their time gaps to query m; n <= kBlock.
  template <typename F>
  inline void columns(int64_t m, int64_t t, int64_t n, F f) const {
    for (int64_t i = 0; i < e_.layout.num_chunks(); ++i) {
      f(e_.layout.chunks()[i].first_row, values_.data() + i * (end_ - begin_) + (t - begin_));
    }
    if (e_.has_times) {
      uint16_t gaps[kBlock];
      for (int64_t i = 0; i < n; ++i) gaps[i] = gap_bucket(e_.query_time[m] - e_.event_time[t + i]);
      f(e_.layout.num_rows(), gaps);
    }
  }

 private:
  const Events& e_;
  int64_t begin_ = 0, end_ = -1;
  std::vector<uint16_t> values_;
};

// Calls work(first, last) for shares of the queries of about equally many events, in parallel.
template <typename Work>
void for_shares(const Events& e, Work work) {
  std::vector<int64_t> cost(e.queries + 1, 0);
  for (int64_t m = 0; m < e.queries; ++m) cost[m + 1] = cost[m] + e.end[m] - e.begin[m] + 64;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), e.queries);
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share) {
      const auto border = [&](int64_t i) {
        return std::lower_bound(cost.begin(), cost.end(), cost.back() * i / shares) - cost.begin();
      };
      const int64_t from = border(share), to = share + 1 == shares ? e.queries : border(share + 1);
      if (from < to) work(from, to);
    }
  });
}

template <int HP>
void forward(const Events& e, const float* scores, int64_t first_head, int64_t heads, float* mass, float* lse) {
  using Float = typename Vec<HP>::Float;
  for_shares(e, [&](int64_t from, int64_t to) {
    Window window(e);
    std::vector<Float> table(e.rows()), histogram(e.rows());
    Float block[kBlock];
    for (int64_t m = from; m < to; ++m) {
      window.show(m, to);
      expand(e, scores + m * e.values() * e.heads, first_head, heads, table.data(), 1);
      std::fill(histogram.begin(), histogram.end(), Float{});
      Float most = Float{} - std::numeric_limits<float>::max(), sum{};
      for (int64_t begin = e.begin[m]; begin < e.end[m]; begin += kBlock) {
        const int64_t n = std::min(kBlock, e.end[m] - begin);
        std::fill(block, block + n, Float{});
        window.columns(m, begin, n, [&](int64_t first, const uint16_t* value) {
          for (int64_t t = 0; t < n; ++t) block[t] += table[first + value[t]];
        });
        Float block_most = most;
        for (int64_t t = 0; t < n; ++t) block_most = max(block_most, block[t]);
        if (e.softmax) {
          bool grew = false;
          for (int h = 0; h < HP; ++h) grew |= block_most[h] > most[h];
          if (grew) { // what is summed so far was relative to a smaller maximum
            const Float scale = exp<HP>(most - block_most);
            for (Float& row : histogram) row *= scale;
            sum *= scale;
            most = block_most;
          }
        }
        for (int64_t t = 0; t < n; ++t) {
          block[t] = e.softmax ? exp<HP>(block[t] - most) : block[t] / (1.0f + exp<HP>(-block[t]));
          sum += block[t];
        }
        window.columns(m, begin, n, [&](int64_t first, const uint16_t* value) {
          for (int64_t t = 0; t < n; ++t) histogram[first + value[t]] += block[t];
        });
      }
      const bool empty = e.begin[m] == e.end[m];
      if (e.softmax && !empty) {
        for (Float& row : histogram) row /= sum;
      }
      marginals(e, histogram.data(), first_head, heads, mass + m * e.values() * e.heads);
      for (int64_t h = 0; h < heads; ++h) {
        float& out = lse[m * e.heads + first_head + h];
        out = !e.softmax ? 0.0f : empty ? -std::numeric_limits<float>::infinity() : most[h] + std::log(sum[h]);
      }
    }
  });
}

template <int HP>
void backward(const Events& e, const float* scores, const float* grad_mass, const float* lse, const float* shift,
              int64_t first_head, int64_t heads, float* grad_scores) {
  using Float = typename Vec<HP>::Float;
  struct Row {
    Float score, grad;
  };
  for_shares(e, [&](int64_t from, int64_t to) {
    Window window(e);
    std::vector<Row> table(e.rows());
    std::vector<Float> histogram(e.rows());
    Row block[kBlock];
    const auto load = [&](const float* values, int64_t m) {
      Float x{};
      std::memcpy(&x, values + m * e.heads + first_head, heads * sizeof(float));
      return x;
    };
    for (int64_t m = from; m < to; ++m) {
      window.show(m, to);
      const int64_t offset = m * e.values() * e.heads;
      expand(e, scores + offset, first_head, heads, &table.data()->score, 2);
      expand(e, grad_mass + offset, first_head, heads, &table.data()->grad, 2);
      std::fill(histogram.begin(), histogram.end(), Float{});
      const Float lse_h = load(lse, m), shift_h = load(shift, m);
      for (int64_t begin = e.begin[m]; begin < e.end[m]; begin += kBlock) {
        const int64_t n = std::min(kBlock, e.end[m] - begin);
        std::fill(block, block + n, Row{});
        window.columns(m, begin, n, [&](int64_t first, const uint16_t* value) {
          for (int64_t t = 0; t < n; ++t) {
            const Row& row = table[first + value[t]];
            block[t].score += row.score;
            block[t].grad += row.grad;
          }
        });
        for (int64_t t = 0; t < n; ++t) {
          const Float score = block[t].score, grad = block[t].grad;
          if (e.softmax) {
            block[t].grad = exp<HP>(score - lse_h) * (grad + shift_h);
          } else {
            const Float sigmoid = 1.0f / (1.0f + exp<HP>(-score));
            block[t].grad = grad * sigmoid * (1.0f + score * (1.0f - sigmoid));
          }
        }
        window.columns(m, begin, n, [&](int64_t first, const uint16_t* value) {
          for (int64_t t = 0; t < n; ++t) histogram[first + value[t]] += block[t].grad;
        });
      }
      marginals(e, histogram.data(), first_head, heads, grad_scores + offset);
    }
  });
}

// Calls f<HP>(first_head, heads) for groups of up to 8 heads.
template <typename F4, typename F8>
void for_head_groups(int64_t heads, F4 four, F8 eight) {
  for (int64_t first = 0; first < heads; first += 8) {
    const int64_t count = std::min<int64_t>(8, heads - first);
    count <= 4 ? four(first, count) : eight(first, count);
  }
}

std::tuple<at::Tensor, at::Tensor> code_attention(
    const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
    const std::optional<at::Tensor>& event_time, const std::optional<at::Tensor>& query_time, at::IntArrayRef radices,
    at::IntArrayRef digit_words, bool softmax) {
  const Events e = check(words, begin, end, scores, event_time, query_time, radices, digit_words, softmax);
  at::Tensor mass = at::empty_like(scores), lse = at::empty({e.queries, e.heads}, scores.options());
  const float* s = scores.const_data_ptr<float>();
  float *m = mass.mutable_data_ptr<float>(), *l = lse.mutable_data_ptr<float>();
  for_head_groups(
      e.heads, [&](int64_t first, int64_t count) { forward<4>(e, s, first, count, m, l); },
      [&](int64_t first, int64_t count) { forward<8>(e, s, first, count, m, l); });
  return {mass, lse};
}

at::Tensor code_attention_backward(
    const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
    const std::optional<at::Tensor>& event_time, const std::optional<at::Tensor>& query_time,
    const at::Tensor& grad_mass, const at::Tensor& lse, const at::Tensor& shift, at::IntArrayRef radices,
    at::IntArrayRef digit_words, bool softmax) {
  const Events e = check(words, begin, end, scores, event_time, query_time, radices, digit_words, softmax);
  at::Tensor grad = at::empty_like(scores);
  const float *s = scores.const_data_ptr<float>(), *g = grad_mass.const_data_ptr<float>();
  const float *l = lse.const_data_ptr<float>(), *d = shift.const_data_ptr<float>();
  float* out = grad.mutable_data_ptr<float>();
  for_head_groups(
      e.heads, [&](int64_t first, int64_t count) { backward<4>(e, s, g, l, d, first, count, out); },
      [&](int64_t first, int64_t count) { backward<8>(e, s, g, l, d, first, count, out); });
  return grad;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sidrec_cpu, m) {
  m.def("code_attention(Tensor words, Tensor begin, Tensor end, Tensor scores, Tensor? event_time, Tensor? query_time, "
        "int[] radices, int[] digit_words, bool softmax) -> (Tensor, Tensor)",
        code_attention);
  m.def("code_attention_backward(Tensor words, Tensor begin, Tensor end, Tensor scores, Tensor? event_time, "
        "Tensor? query_time, Tensor grad_mass, Tensor lse, Tensor shift, int[] radices, int[] digit_words, bool softmax)"
        " -> Tensor",
        code_attention_backward);
}

} // namespace sidrec
