// Whether all of a server's inputs are in range, in one pass and without temporaries; scorer.py says what is checked.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>

namespace sidrec {
namespace {

// Whether each of values [N, C], or [N], is from 0 to the ``last`` [C] of its column, or the only one []; ``may_miss``: or all of
// its row are -1.
bool are_in_range(const at::Tensor& values, const at::Tensor& last, bool may_miss) {
  const int64_t N = values.size(0), C = values.dim() > 1 ? values.size(1) : 1;
  TORCH_CHECK(values.scalar_type() == at::kLong && last.scalar_type() == at::kLong && last.numel() == C,
              "in_range wants int64, and a bound for each column");
  const at::Tensor rows = values.contiguous(), bounds = last.contiguous();
  const int64_t *row = rows.const_data_ptr<int64_t>(), *most = bounds.const_data_ptr<int64_t>();
  bool are_all = true;
  if (C == 1) { // most often, and then vectors
    const int64_t lowest = may_miss ? -1 : 0, highest = most[0];
    int64_t wrong = 0;
    for (int64_t i = 0; i < N; ++i) wrong |= (row[i] < lowest) | (row[i] > highest);
    return !wrong;
  }
  for (int64_t i = 0; i < N; ++i, row += C) {
    bool is_in_range = true, is_missing = may_miss;
    for (int64_t c = 0; c < C; ++c) {
      is_in_range &= row[c] >= 0 && row[c] <= most[c];
      is_missing &= row[c] == -1;
    }
    are_all &= is_in_range || is_missing;
  }
  return are_all;
}

// The same of several tensors, of which the first ``may_miss`` may have rows of -1.
bool in_range(at::TensorList values, at::TensorList last, int64_t may_miss) {
  bool are_all = true;
  for (size_t i = 0; i < values.size(); ++i) are_all &= are_in_range(values[i], last[i], static_cast<int64_t>(i) < may_miss);
  return are_all;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sidrec_native, m) {
  m.def("in_range(Tensor[] values, Tensor[] last, int may_miss) -> bool", in_range);
}

} // namespace sidrec
