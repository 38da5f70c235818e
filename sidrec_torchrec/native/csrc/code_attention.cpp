// Attention over packed SIDs on CPU; code_attention.py says what it computes.
//
// Per query, the scores of digit values are summed into one small table per chunk of a few digits (243 rows for 5 trits),
// which stays in L1; an event's score is a sum of one row per chunk, and its weight is added to one row per chunk of a
// histogram of the same shape. Heads are the vector dimension, and forward also the queries that read the same events at
// the same time, such as the candidates of a request.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_events.h"
#include "attention_tables.h"
#include "operators.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kBlock = 128;    // events whose scores are held at a time
constexpr float kHeadroom = 16.0f; // weights are relative to a score that no other exceeds by more: floats have room for sums of e^16

// Calls work(first, last, share) for shares of the cuts of about equally many events, in parallel.
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
      if (from < to) work(cuts.data() + from, cuts.data() + to, share);
    }
  });
}

// Makes weights of scores, relative to ``most``; returns their sum. Vectors are as wide as can be, of some events each: only
// tables' rows need be an event at a time.
template <int HP>
typename Vec<HP>::Float weigh(Wide* scores, int64_t n, typename Vec<HP>::Float most, bool softmax) {
  Wide sums{};
  const Wide base = repeat<HP>(most);
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = softmax ? exp<kWidest>(scores[i] - base) : scores[i] / (1.0f + exp<kWidest>(-scores[i]));
    sums += scores[i];
  }
  typename Vec<HP>::Float sum{};
  for (int i = 0; i < kWidest / HP; ++i) sum += part<HP>(sums, i);
  return sum;
}

template <int HP>
typename Vec<HP>::Float highest(const Wide* scores, int64_t n, typename Vec<HP>::Float most) {
  Wide all = repeat<HP>(most);
  for (int64_t i = 0; i < n; ++i) all = max(all, scores[i]);
  for (int i = 0; i < kWidest / HP; ++i) most = max(most, part<HP>(all, i));
  return most;
}

template <int HP>
void forward(const Events& e, const Lanes& lanes, const Window& window, const float* scores, float* mass, float* lse) {
  using Float = typename Vec<HP>::Float;
  constexpr int64_t kBlock = 8192 / (HP * HP), kAtOnce = kWidest / HP;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static thread_local std::vector<Float> table;
  table.resize(e.rows());
  Histogram<Float> histogram(e);
  expand(e, scores, lanes, table.data(), 1);
  Wide wide[kBlock / kAtOnce];
  Float* const block = reinterpret_cast<Float*>(wide);
  Float scaled[kBlock], most = Float{} - std::numeric_limits<float>::max(), sum{};
  const int64_t m = lanes.query;
  for (int64_t begin = e.begin[m]; begin < e.end[m]; begin += kBlock) {
    const int64_t n = std::min(kBlock, e.end[m] - begin), n_wide = (n + kAtOnce - 1) / kAtOnce;
    window.add_rows(table.data(), begin, n, block);
    std::fill(block + n, block + n_wide * kAtOnce, Float{} + (e.softmax ? -kInfinity : 0.0f)); // no weight
    if (e.softmax) {
      const Float block_most = highest<HP>(wide, n_wide, most);
      bool grew = false;
      for (int h = 0; h < HP; ++h) grew |= block_most[h] > most[h] + kHeadroom;
      if (grew) { // what is summed so far is relative to a far smaller score
        if (begin > e.begin[m]) {
          const Float scale = exp<HP>(most - block_most);
          histogram.scale(scale);
          sum *= scale;
        }
        most = block_most;
      }
    }
    sum += weigh<HP>(wide, n_wide, most, e.softmax);
    if (e.scaled_chunks > 0) {
      for (int64_t t = 0; t < n; ++t) scaled[t] = block[t] * e.scale[begin + t];
    }
    histogram.add(window, begin, n, block, scaled);
  }
  const bool empty = e.begin[m] == e.end[m];
  if (e.softmax && !empty) histogram.scale(1.0f / sum);
  marginals(e, histogram.sums(window, e.begin[m]), lanes, mass);
  for (int64_t i = 0; i < lanes.count(); ++i) {
    const int64_t query = m + i / lanes.heads, head = lanes.first_head + i % lanes.heads;
    lse[query * e.heads + head] =
        !e.softmax ? 0.0f : empty ? -kInfinity : most[i] + std::log(sum[i]);
  }
}

template <int HP>
void backward(const Events& e, const Lanes& lanes, const Window& window, const float* scores, const float* grad_mass,
              const float* lse, const float* shift, float* grad_scores, double* grad_scale) {
  using Float = typename Vec<HP>::Float;
  struct Row {
    Float score, grad;
    void operator+=(const Row& row) {
      score += row.score;
      grad += row.grad;
    }
    void operator*=(float scale) {
      score *= scale;
      grad *= scale;
    }
  };
  static thread_local std::vector<Row> table;
  table.resize(e.rows());
  Histogram<Float> histogram(e);
  expand(e, scores, lanes, &table.data()->score, 2);
  expand(e, grad_mass, lanes, &table.data()->grad, 2);
  const int64_t m = lanes.query; // the only one
  const auto load = [&](const float* values_MH) {
    Float x{};
    std::memcpy(&x, values_MH + m * e.heads + lanes.first_head, lanes.heads * sizeof(float));
    return x;
  };
  const Float lse_h = load(lse), shift_h = load(shift);
  constexpr int64_t kAtOnce = kWidest / HP;
  Row block[kBlock], unscaled[kBlock];
  Float grads[kBlock], scaled[kBlock];
  Wide wide[kBlock / kAtOnce] = {};
  Float* const exps = reinterpret_cast<Float*>(wide); // e^(score - lse), or e^-score
  for (int64_t begin = e.begin[m]; begin < e.end[m]; begin += kBlock) {
    const int64_t n = std::min(kBlock, e.end[m] - begin);
    window.add_rows(table.data(), begin, n, block, grad_scale ? unscaled : nullptr);
    for (int64_t t = 0; t < n; ++t) exps[t] = e.softmax ? block[t].score - lse_h : -block[t].score;
    for (int64_t i = 0; i * kAtOnce < n; ++i) wide[i] = exp<kWidest>(wide[i]);
    for (int64_t t = 0; t < n; ++t) {
      const Float score = block[t].score, grad = block[t].grad;
      Float weight = exps[t];
      if (e.softmax) {
        grads[t] = weight * (grad + shift_h);
      } else {
        const Float sigmoid = 1.0f / (1.0f + weight);
        weight = score * sigmoid;
        grads[t] = grad * sigmoid * (1.0f + score * (1.0f - sigmoid));
      }
      if (grad_scale) {
        const Float of_heads = grads[t] * unscaled[t].score + weight * unscaled[t].grad;
        float sum = 0;
        for (int64_t h = 0; h < lanes.heads; ++h) sum += of_heads[h];
        grad_scale[begin + t] += sum;
      }
    }
    if (e.scaled_chunks > 0) {
      for (int64_t t = 0; t < n; ++t) scaled[t] = grads[t] * e.scale[begin + t];
    }
    histogram.add(window, begin, n, grads, scaled);
  }
  marginals(e, histogram.sums(window, e.begin[m]), lanes, grad_scores);
}

// Calls work(lanes, window, share) for each cut, of up to so many lanes, in parallel.
template <typename Work>
void for_lanes(const Events& e, int64_t most_lanes, bool join_queries, Work work) {
  for_shares(e, cut(e, most_lanes, join_queries), [&](const Lanes* first, const Lanes* last, int64_t share) {
    Window window(e);
    for (const Lanes* lanes = first; lanes < last; ++lanes) {
      window.show(lanes->query, (last - 1)->query + 1);
      work(*lanes, window, share);
    }
  });
}

// What the threads add up, each for itself, of numbers that queries of several of them may share.
class SharedSums {
 public:
  explicit SharedSums(int64_t n) : n_(n), of_share_(n ? at::get_num_threads() : 0) {}

  // Zero at first; null if there is nothing to add up.
  double* of(int64_t share) {
    if (!n_) return nullptr;
    if (of_share_[share].empty()) of_share_[share].resize(n_);
    return of_share_[share].data();
  }

  // In double precision until here, so that float's bits do not depend on the number of threads, but by the rarest chance.
  void write(float* out) const {
    std::vector<double> sums(n_);
    for (const auto& share : of_share_) {
      for (size_t i = 0; i < share.size(); ++i) sums[i] += share[i];
    }
    std::copy(sums.begin(), sums.end(), out);
  }

 private:
  int64_t n_;
  std::vector<std::vector<double>> of_share_;
};

// Digits of scaled chunks must not be joined with others; chunks of fewer values may end elsewhere than the check's.
bool takes(const Inputs& inputs, int64_t limit) {
  return !inputs.scale || (inputs.scale->scalar_type() == at::kFloat &&
                           Layout(inputs.radices, inputs.digit_words, limit).chunks_of_first(inputs.scaled_digits) >= 0);
}

std::tuple<at::Tensor, at::Tensor> code_attention_backward(
    const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
    const OptionalTensor& event_time, const OptionalTensor& query_time, const OptionalTensor& scale,
    const at::Tensor& grad_mass, const at::Tensor& lse, const at::Tensor& shift, at::IntArrayRef radices,
    at::IntArrayRef digit_words, int64_t scaled_digits, bool softmax) {
  Inputs given{words, begin, end, scores, event_time, query_time, scale, radices, digit_words, scaled_digits};
  const bool taken = given.taken();
  if (taken) given = given.ready();
  const int64_t limit = taken ? chunk_limit(given.begin, given.end, scores.size(2)) : 0;
  if (!taken || !takes(given, limit)) {
    const auto results = reference("code_attention_backward", words, begin, end, scores, event_time, query_time, scale,
                                   grad_mass, lse, shift, radices, digit_words, scaled_digits, softmax);
    return {results[0].toTensor(), results[1].toTensor()};
  }
  const Events e = given.events(limit, softmax);
  const at::Tensor own_grad = ready(grad_mass), own_lse = ready(lse), own_shift = ready(shift);
  at::Tensor grad = at::empty_like(given.scores), grad_scale = at::empty({scale ? words.size(0) : 0}, scores.options());
  SharedSums sums(grad_scale.size(0));
  const float *s = given.scores.const_data_ptr<float>(), *g = own_grad.const_data_ptr<float>();
  const float *l = own_lse.const_data_ptr<float>(), *d = own_shift.const_data_ptr<float>();
  float* out = grad.mutable_data_ptr<float>();
  for_lanes(e, 8, false, [&](const Lanes& lanes, const Window& window, int64_t share) {
    const auto run = lanes.count() <= 4 ? backward<4> : backward<8>;
    run(e, lanes, window, s, g, l, d, out, sums.of(share));
  });
  sums.write(grad_scale.mutable_data_ptr<float>());
  return {grad, grad_scale};
}

// Masses [M, V, H] and log-sum-exps [M, H] of the queries of a call that is ready.
std::tuple<at::Tensor, at::Tensor> attend(const Inputs& given, int64_t limit, bool softmax) {
  const Events e = given.events(limit, softmax);
  at::Tensor mass = at::empty_like(given.scores), lse = at::empty({e.queries, e.heads}, given.scores.options());
  const float* s = given.scores.const_data_ptr<float>();
  float *m = mass.mutable_data_ptr<float>(), *l = lse.mutable_data_ptr<float>();
  for_lanes(e, kWidest, true, [&](const Lanes& lanes, const Window& window, int64_t) {
    const auto run = lanes.count() <= 4 ? forward<4> : lanes.count() <= 8 ? forward<8> : forward<kWidest>;
    run(e, lanes, window, s, m, l);
  });
  return {mass, lse};
}

// A request of few candidates has fewer cuts than there are threads: its history is read in 2, 4 or 8 pieces of at least kPiece
// events. Their number does not depend on that of the threads, so that results do not.
constexpr int64_t kPiece = 2'000, kFewCuts = 8;

int64_t pieces_of(const Inputs& given) {
  given.check_ranges();
  const int64_t M = given.scores.size(0), cuts = M * ((given.scores.size(2) + kWidest - 1) / kWidest);
  const int64_t *begin = given.begin.const_data_ptr<int64_t>(), *end = given.end.const_data_ptr<int64_t>();
  int64_t most = 0, pieces = 1;
  for (int64_t m = 0; m < M; ++m) most = std::max(most, end[m] - begin[m]);
  while (cuts > 0 && 2 * pieces * cuts <= kFewCuts && 2 * pieces * kPiece <= most) pieces *= 2;
  return pieces;
}

// As attend, by softmax: each piece of a query's events is a query of its own, and what they give is put together.
std::tuple<at::Tensor, at::Tensor> attend_to_pieces(const Inputs& given, int64_t limit, int64_t pieces) {
  const int64_t M = given.scores.size(0), V = given.scores.size(1), H = given.scores.size(2);
  const int64_t *begin = given.begin.const_data_ptr<int64_t>(), *end = given.end.const_data_ptr<int64_t>();
  Inputs parts = given;
  parts.begin = at::empty({pieces * M}, given.begin.options());
  parts.end = at::empty_like(parts.begin);
  parts.scores = at::empty({pieces * M, V, H}, given.scores.options());
  if (given.query_time) parts.query_time = at::empty_like(parts.begin);
  for (int64_t p = 0; p < pieces; ++p) {
    for (int64_t m = 0; m < M; ++m) {
      const int64_t n = end[m] - begin[m];
      parts.begin.mutable_data_ptr<int64_t>()[p * M + m] = begin[m] + n * p / pieces;
      parts.end.mutable_data_ptr<int64_t>()[p * M + m] = begin[m] + n * (p + 1) / pieces;
    }
    std::copy_n(given.scores.const_data_ptr<float>(), M * V * H, parts.scores.mutable_data_ptr<float>() + p * M * V * H);
    if (!given.query_time) continue;
    std::copy_n(given.query_time->const_data_ptr<int64_t>(), M, parts.query_time->mutable_data_ptr<int64_t>() + p * M);
  }
  const auto [masses, lses] = attend(parts, limit, true);
  at::Tensor mass = at::zeros_like(given.scores), lse = at::empty({M, H}, given.scores.options());
  const float *of_parts = masses.const_data_ptr<float>(), *lse_of_parts = lses.const_data_ptr<float>();
  float *sums = mass.mutable_data_ptr<float>(), *whole = lse.mutable_data_ptr<float>();
  std::vector<float> share(H);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t h = 0; h < H; ++h) {
      float most = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t p = 0; p < pieces; ++p) most = std::max(most, lse_of_parts[(p * M + m) * H + h]);
      for (int64_t p = 0; p < pieces && begin[m] < end[m]; ++p) sum += std::exp(lse_of_parts[(p * M + m) * H + h] - most);
      whole[m * H + h] = most + std::log(sum);
    }
    for (int64_t p = 0; p < pieces && begin[m] < end[m]; ++p) {
      for (int64_t h = 0; h < H; ++h) share[h] = std::exp(lse_of_parts[(p * M + m) * H + h] - whole[m * H + h]);
      for (int64_t v = 0; v < V; ++v) {
        for (int64_t h = 0; h < H; ++h) sums[(m * V + v) * H + h] += share[h] * of_parts[((p * M + m) * V + v) * H + h];
      }
    }
  }
  return {mass, lse};
}

} // namespace

std::tuple<at::Tensor, at::Tensor> code_attention(
    const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
    const OptionalTensor& event_time, const OptionalTensor& query_time, const OptionalTensor& scale,
    at::IntArrayRef radices, at::IntArrayRef digit_words, int64_t scaled_digits, bool softmax) {
  Inputs given{words, begin, end, scores, event_time, query_time, scale, radices, digit_words, scaled_digits};
  const bool taken = given.taken();
  if (taken) given = given.ready();
  const int64_t limit = taken ? chunk_limit(given.begin, given.end, scores.size(2)) : 0;
  if (!taken || !takes(given, limit)) {
    const auto results = reference("code_attention", words, begin, end, scores, event_time, query_time, scale, radices,
                                   digit_words, scaled_digits, softmax);
    return {results[0].toTensor(), results[1].toTensor()};
  }
  const int64_t pieces = softmax ? pieces_of(given) : 1;
  return pieces > 1 ? attend_to_pieces(given, limit, pieces) : attend(given, limit, softmax);
}

TORCH_LIBRARY_IMPL(sidrec, CPU, m) {
  m.impl("code_attention", code_attention);
  m.impl("code_attention_backward", code_attention_backward);
}

} // namespace sidrec
