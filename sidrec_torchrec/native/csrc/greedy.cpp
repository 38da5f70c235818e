// Digits of vectors by greedy search in float32 on CPU, and whether rounding could change them. What is computed stands
// in ops/greedy.py, and what it means in codec/plan.py. Here a tile
// of vectors is read once, and all that follows stays in cache; its levels lie row of the basis by row of the basis, so
// that an instruction takes one number of each of several vectors.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "kernel.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kRows = 6, kColumns = 16; // of a block of the product, whose sums fill 12 registers
constexpr int64_t kTile = 48;               // vectors at a time, a multiple of kRows and kLanes
constexpr int64_t kGroups = kTile / kLanes;
constexpr int64_t kCacheLine = 16;          // floats
constexpr float kLargest = 1e9f;            // as plan.py has it
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Float = Vec<kLanes>::Float;
using Int = Vec<kLanes>::Int;

template <typename Vector, typename Number>
inline Vector load(const Number* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <typename Vector, typename Number>
inline void store(Number* to, Vector x) {
  std::memcpy(to, &x, sizeof(x));
}

// Of a number that need not be there: a hint, without effect where it is not.
inline void prefetch(const float* from, int64_t index) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + index * sizeof(float)));
}

// The level of a coordinate, or one of ``width`` codewords.
struct Choice {
  int64_t first, width, count; // rows of the basis; digits
  int64_t stage;               // that it decides, or a part of which
  float reach;
  bool is_coordinate() const { return width == 1; }
};

struct Plan {
  std::vector<Choice> choices;
  int64_t D, R, L;
  std::vector<float> panels; // weights, kColumns rows at a time: [ceil(R / kColumns)][D][kColumns]
  const float* bias;         // [R]
  const float* pull;         // [R][R], column by column
  float tie, unit_error, size;
};

struct Tile {
  std::vector<float> levels; // [R][kTile]
  std::vector<float> digits; // of choices, [S][kTile]
  float error[kTile];
  int32_t sure[kTile]; // -1: yes
};

std::vector<float> to_panels(const at::Tensor& weight) {
  const int64_t R = weight.size(0), D = weight.size(1);
  const float* from = weight.const_data_ptr<float>();
  std::vector<float> panels((R + kColumns - 1) / kColumns * kColumns * D);
  for (int64_t r = 0; r < R; ++r) {
    float* to = panels.data() + r / kColumns * kColumns * D + r % kColumns;
    for (int64_t d = 0; d < D; ++d) to[d * kColumns] = from[r * D + d];
  }
  return panels;
}

float norm(const float* z, int64_t D) {
  Float sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const Float x = load<Float>(z + d + i * kLanes);
      sum[i] += x * x;
    }
  }
  const Float sums = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sums[i];
  for (; d < D; ++d) total += z[d] * z[d];
  return std::sqrt(total);
}

// Levels of kRows vectors z before any digit, for the first ``columns`` of a panel.
void multiply(const float* const* z, int64_t D, const float* panel, const float* bias, int64_t columns, float* levels) {
  Float sum[kRows][2] = {};
  for (int64_t d = 0; d < D; ++d) {
    if (d % kCacheLine == 0) {
      for (int i = 0; i < kRows; ++i) prefetch(z[i], kTile * D + d); // the next tile's vectors
    }
    const Float low = load<Float>(panel + d * kColumns), high = load<Float>(panel + d * kColumns + kLanes);
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] += z[i][d] * low;
      sum[i][1] += z[i][d] * high;
    }
  }
  float sums[kRows][kColumns];
  std::memcpy(sums, sum, sizeof(sums));
  for (int64_t c = 0; c < columns; ++c) {
    for (int i = 0; i < kRows; ++i) levels[c * kTile + i] = bias[c] + sums[i][c];
  }
}

// Adjusts the levels of choice ``s`` to the digits of the choices before.
void subtract(const Plan& plan, size_t s, Tile& tile) {
  const Choice& own = plan.choices[s];
  for (int64_t r = own.first; r < own.first + own.width; ++r) {
    float* levels = tile.levels.data() + r * kTile;
    Float sum[kGroups];
    for (int g = 0; g < kGroups; ++g) sum[g] = load<Float>(levels + g * kLanes);
    for (size_t e = 0; e < s; ++e) {
      if (!plan.choices[e].is_coordinate()) continue;
      const float pull = plan.pull[plan.choices[e].first * plan.R + r];
      for (int g = 0; g < kGroups; ++g) sum[g] += pull * load<Float>(tile.digits.data() + e * kTile + g * kLanes);
    }
    for (int g = 0; g < kGroups; ++g) store(levels + g * kLanes, sum[g]);
  }
  for (size_t e = 0; e < s; ++e) {
    if (plan.choices[e].is_coordinate()) continue;
    for (int64_t n = 0; n < kTile; ++n) {
      const int64_t column = plan.choices[e].first + static_cast<int64_t>(tile.digits[e * kTile + n]);
      const float* pull = plan.pull + column * plan.R;
      for (int64_t r = own.first; r < own.first + own.width; ++r) tile.levels[r * kTile + n] += pull[r];
    }
  }
}

// The digit of a coordinate; returns whether it is sure: no threshold, a whole number, is as near as the error.
inline Int round_up(const Choice& choice, Float level, Float error, Float& digit) {
  const Float low = Float{} - 0.5f, high = Float{} + (choice.count - 1.5f);
  const Float magic = Float{} + 12582912.0f; // 1.5 * 2^23: adding and taking it away rounds to the nearest
  level = level < low ? low : level;
  level = level > high ? high : level;
  const Float nearest = (level + magic) - magic;
  digit = nearest - __builtin_convertvector(level > nearest, Float); // true is -1
  const Float distance = max(level - nearest, nearest - level);
  return distance > choice.reach * error;
}

// The codeword of least level; returns whether it is sure: no other is as near as the errors of both.
inline Int take_least(const Choice& choice, const float* levels, Float error, float tie, Float& digit) {
  Float least = Float{} + kInfinity, second = least;
  digit = Float{}; // stays one of the digits, whatever the levels
  for (int64_t k = 0; k < choice.count; ++k) {
    const Float level = load<Float>(levels + k * kTile);
    const Float larger = max(level, least);
    second = larger < second ? larger : second;
    digit = level < least ? Float{} + static_cast<float>(k) : digit;
    least = level < least ? level : least;
  }
  return second > least + (2 * choice.reach * error + tie);
}

void search(const Plan& plan, Tile& tile) {
  std::fill_n(tile.sure, kTile, -1);
  for (size_t s = 0; s < plan.choices.size(); ++s) {
    const Choice& choice = plan.choices[s];
    subtract(plan, s, tile);
    for (int64_t n = 0; n < kTile; n += kLanes) {
      const float* levels = tile.levels.data() + choice.first * kTile + n;
      const Float error = load<Float>(tile.error + n);
      Float digit;
      const Int sure = choice.is_coordinate() ? round_up(choice, load<Float>(levels), error, digit)
                                              : take_least(choice, levels, error, plan.tie, digit);
      store(tile.digits.data() + s * kTile + n, digit);
      store(tile.sure + n, load<Int>(tile.sure + n) & sure);
    }
  }
}

// Writes digits of stages: those of a stage's choices, read as one number.
void join(const Plan& plan, const Tile& tile, int64_t count, int16_t* out) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t lanes = std::min(kLanes, count - n);
    Float joined = {};
    for (size_t s = 0; s < plan.choices.size(); ++s) {
      const Choice& choice = plan.choices[s];
      joined = joined * static_cast<float>(choice.count) + load<Float>(tile.digits.data() + s * kTile + n);
      if (s + 1 < plan.choices.size() && plan.choices[s + 1].stage == choice.stage) continue;
      const Int digits = __builtin_convertvector(joined, Int);
      for (int64_t i = 0; i < lanes; ++i) out[(n + i) * plan.L + choice.stage] = static_cast<int16_t>(digits[i]);
      joined = Float{};
    }
  }
}

void encode(const Plan& plan, const float* z, const float* error, int64_t count, Tile& tile, int16_t* digits,
            bool* sure) {
  const float* vectors[kTile];
  for (int64_t n = 0; n < kTile; ++n) {
    vectors[n] = z + std::min(n, count - 1) * plan.D; // a short tile repeats its last vector
    const float length = norm(vectors[n], plan.D);
    const float own = error == nullptr ? 0 : error[std::min(n, count - 1)];
    tile.error[n] = length < kLargest ? plan.unit_error * (length + plan.size) + own : kInfinity; // also where it is NaN
  }
  for (int64_t r = 0; r < plan.R; r += kColumns) {
    for (int64_t n = 0; n < kTile; n += kRows) {
      multiply(vectors + n, plan.D, plan.panels.data() + r * plan.D, plan.bias + r, std::min(kColumns, plan.R - r),
               tile.levels.data() + r * kTile + n);
    }
  }
  search(plan, tile);
  join(plan, tile, count, digits);
  for (int64_t n = 0; n < count; ++n) sure[n] = tile.sure[n] != 0;
}

// Digits of stages, int16 [N, L], and whether they are sure, bool [N]. Choices have widths, counts, stages and reaches;
// ``pull`` is transposed. ``error``: by how much vectors may be off, [N]. Digits that are not sure may be anything.
std::tuple<at::Tensor, at::Tensor> encode_all(const at::Tensor& z, const at::Tensor& weight, const at::Tensor& bias,
                                              const at::Tensor& pull, at::IntArrayRef widths, at::IntArrayRef counts,
                                          at::IntArrayRef stages, at::ArrayRef<double> reaches, double tie,
                                          double unit_error, double size,
                                          const std::optional<at::Tensor>& error) {
  const int64_t N = z.size(0), D = weight.size(1), R = weight.size(0), L = stages.back() + 1;
  for (const at::Tensor* tensor : {&z, &weight, &bias, &pull}) TORCH_CHECK(tensor->is_contiguous());
  Plan plan{{}, D, R, L, to_panels(weight), bias.const_data_ptr<float>(), pull.const_data_ptr<float>(),
            static_cast<float>(tie), static_cast<float>(unit_error), static_cast<float>(size)};
  int64_t first = 0;
  for (size_t s = 0; s < widths.size(); ++s) {
    plan.choices.push_back({first, widths[s], counts[s], stages[s], static_cast<float>(reaches[s])});
    first += widths[s];
  }
  TORCH_CHECK(first == R && z.size(1) == D && bias.numel() == R && pull.numel() == R * R, "operands of other sizes");
  TORCH_CHECK(!error || (error->is_contiguous() && error->numel() == N), "an error for each vector");
  const float* errors = error ? error->const_data_ptr<float>() : nullptr;
  at::Tensor digits = at::empty({N, L}, z.options().dtype(at::kShort));
  at::Tensor sure = at::empty({N}, z.options().dtype(at::kBool));
  const float* from = z.const_data_ptr<float>();
  int16_t* to = digits.mutable_data_ptr<int16_t>();
  bool* to_sure = sure.mutable_data_ptr<bool>();
  at::parallel_for(0, (N + kTile - 1) / kTile, 4, [&](int64_t begin, int64_t end) {
    Tile tile{std::vector<float>(R * kTile), std::vector<float>(widths.size() * kTile), {}, {}};
    for (int64_t n = begin * kTile; n < std::min(N, end * kTile); n += kTile) {
      encode(plan, from + n * D, errors == nullptr ? errors : errors + n, std::min(kTile, N - n), tile, to + n * L, to_sure + n);
    }
  });
  return {digits, sure};
}

std::tuple<at::Tensor, at::Tensor> greedy(const at::Tensor& z, const at::Tensor& weight, const at::Tensor& bias,
                                          const at::Tensor& pull, at::IntArrayRef widths, at::IntArrayRef counts,
                                          at::IntArrayRef stages, at::ArrayRef<double> reaches, double tie,
                                          double unit_error, double size, const OptionalTensor& error) {
  if (may_run(z, {at::kFloat})) {
    return encode_all(ready(z), ready(weight), ready(bias), ready(pull), widths, counts, stages, reaches, tie, unit_error,
                      size, ready(error));
  }
  const auto results =
      reference("greedy", z, weight, bias, pull, widths, counts, stages, reaches, tie, unit_error, size, error);
  return {results[0].toTensor(), results[1].toTensor()};
}

} // namespace

TORCH_LIBRARY_IMPL(sidrec, CPU, m) { m.impl("greedy", greedy); }

} // namespace sidrec
