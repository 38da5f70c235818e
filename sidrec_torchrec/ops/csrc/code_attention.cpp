// Attention over packed SIDs on CPU; code_attention.py says what it computes.
//
// Per query, the scores of digit values are summed into one small table per chunk of a few digits (243 rows for 5 trits),
// which stays in L1; an event's score is a sum of one row per chunk, and its weight is added to one row per chunk of a
// histogram of the same shape. Heads are the vector dimension, and forward also the queries that read the same events at
// the same time, such as the candidates of a request.

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
// histories do better with chunks of 27 values; so that tables stay in L1, vectors of 8 lanes with chunks of 81.
int64_t chunk_limit(const at::Tensor& begin, const at::Tensor& end, int64_t heads) {
  const int64_t queries = begin.size(0);
  const int64_t *from = begin.const_data_ptr<int64_t>(), *to = end.const_data_ptr<int64_t>();
  int64_t events = 0, joined = 0;
  for (int64_t m = 0; m < queries; ++m) {
    events += to[m] - from[m];
    joined += m > 0 && from[m] == from[m - 1] && to[m] == to[m - 1];
  }
  if (events < 300 * queries) return 32;
  return heads > 4 || 2 * joined > queries ? 81 : 256;
}

Events check(const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
             const std::optional<at::Tensor>& event_time, const std::optional<at::Tensor>& query_time,
             at::IntArrayRef radices, at::IntArrayRef digit_words, bool softmax) {
  const auto pointer = [](const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; };
  Events events{Layout(radices, digit_words, chunk_limit(begin, end, scores.size(2))),
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

// What is computed as one vector: some heads of one query, or all heads of some queries that read the same.
struct Lanes {
  int64_t query, queries;
  int64_t first_head, heads;

  int64_t count() const { return queries * heads; }

  // Moves row v of values [M, V, H] to a vector or back: copy(float of the vector, float of the row, how many).
  template <typename Values, typename Copy>
  void row(const Events& e, Values* values_MVH, int64_t v, Copy copy) const {
    for (int64_t i = 0; i < queries; ++i) {
      copy(i * heads, values_MVH + ((query + i) * e.values() + v) * e.heads + first_head, heads);
    }
  }
};

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

// The reverse: sums by digit value [M, V, H] of a histogram by chunk value, which is used up.
template <typename Float>
void marginals(const Events& e, Float* histogram, const Lanes& lanes, float* values_MVH) {
  const auto store = [&](int64_t v, Float x) {
    lanes.row(e, values_MVH, v, [&](int64_t lane, float* row, int64_t heads) {
      std::memcpy(row, reinterpret_cast<float*>(&x) + lane, heads * sizeof(float));
    });
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

// Cuts the work into vectors of at most ``width`` lanes; the same whatever the number of threads, so that results are too.
std::vector<Lanes> cut(const Events& e, int64_t width, bool join_queries) {
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

// Calls work(first, last) for shares of the cuts of about equally many events, in parallel.
template <typename Work>
void for_shares(const Events& e, const std::vector<Lanes>& cuts, Work work) {
  const int64_t n = cuts.size();
  std::vector<int64_t> cost(n + 1, 0);
  for (int64_t i = 0; i < n; ++i) cost[i + 1] = cost[i] + e.end[cuts[i].query] - e.begin[cuts[i].query] + 64;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), n);
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share) {
      const auto border = [&](int64_t i) {
        return std::lower_bound(cost.begin(), cost.end(), cost.back() * i / shares) - cost.begin();
      };
      const int64_t from = border(share), to = share + 1 == shares ? n : border(share + 1);
      if (from < to) work(cuts.data() + from, cuts.data() + to);
    }
  });
}

template <int HP>
void forward(const Events& e, const Lanes& lanes, const Window& window, const float* scores, float* mass, float* lse) {
  using Float = typename Vec<HP>::Float;
  static thread_local std::vector<Float> table, histogram;
  table.resize(e.rows());
  histogram.assign(e.rows(), Float{});
  expand(e, scores, lanes, table.data(), 1);
  Float block[kBlock], most = Float{} - std::numeric_limits<float>::max(), sum{};
  const int64_t m = lanes.query;
  for (int64_t begin = e.begin[m]; begin < e.end[m]; begin += kBlock) {
    const int64_t n = std::min(kBlock, e.end[m] - begin);
    std::fill(block, block + n, Float{});
    window.columns(m, begin, n, [&](int64_t first, const uint16_t* value) {
      for (int64_t t = 0; t < n; ++t) block[t] += table[first + value[t]];
    });
    if (e.softmax) {
      Float block_most = most;
      for (int64_t t = 0; t < n; ++t) block_most = max(block_most, block[t]);
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
  marginals(e, histogram.data(), lanes, mass);
  for (int64_t i = 0; i < lanes.count(); ++i) {
    const int64_t query = m + i / lanes.heads, head = lanes.first_head + i % lanes.heads;
    lse[query * e.heads + head] =
        !e.softmax ? 0.0f : empty ? -std::numeric_limits<float>::infinity() : most[i] + std::log(sum[i]);
  }
}

template <int HP>
void backward(const Events& e, const Lanes& lanes, const Window& window, const float* scores, const float* grad_mass,
              const float* lse, const float* shift, float* grad_scores) {
  using Float = typename Vec<HP>::Float;
  struct Row {
    Float score, grad;
  };
  static thread_local std::vector<Row> table;
  static thread_local std::vector<Float> histogram;
  table.resize(e.rows());
  histogram.assign(e.rows(), Float{});
  expand(e, scores, lanes, &table.data()->score, 2);
  expand(e, grad_mass, lanes, &table.data()->grad, 2);
  const int64_t m = lanes.query; // the only one
  const auto load = [&](const float* values_MH) {
    Float x{};
    std::memcpy(&x, values_MH + m * e.heads + lanes.first_head, lanes.heads * sizeof(float));
    return x;
  };
  const Float lse_h = load(lse), shift_h = load(shift);
  Row block[kBlock];
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
  marginals(e, histogram.data(), lanes, grad_scores);
}

// Calls narrow or wide for each cut of up to 4 and up to 8 lanes, in parallel.
template <typename Narrow, typename Wide>
void for_lanes(const Events& e, bool join_queries, Narrow narrow, Wide wide) {
  for_shares(e, cut(e, 8, join_queries), [&](const Lanes* first, const Lanes* last) {
    Window window(e);
    for (const Lanes* lanes = first; lanes < last; ++lanes) {
      window.show(lanes->query, (last - 1)->query + 1);
      lanes->count() <= 4 ? narrow(*lanes, window) : wide(*lanes, window);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> code_attention(
    const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
    const std::optional<at::Tensor>& event_time, const std::optional<at::Tensor>& query_time, at::IntArrayRef radices,
    at::IntArrayRef digit_words, bool softmax) {
  const Events e = check(words, begin, end, scores, event_time, query_time, radices, digit_words, softmax);
  at::Tensor mass = at::empty_like(scores), lse = at::empty({e.queries, e.heads}, scores.options());
  const float* s = scores.const_data_ptr<float>();
  float *m = mass.mutable_data_ptr<float>(), *l = lse.mutable_data_ptr<float>();
  for_lanes(
      e, true, [&](const Lanes& lanes, const Window& window) { forward<4>(e, lanes, window, s, m, l); },
      [&](const Lanes& lanes, const Window& window) { forward<8>(e, lanes, window, s, m, l); });
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
  for_lanes(
      e, false, [&](const Lanes& lanes, const Window& window) { backward<4>(e, lanes, window, s, g, l, d, out); },
      [&](const Lanes& lanes, const Window& window) { backward<8>(e, lanes, window, s, g, l, d, out); });
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
