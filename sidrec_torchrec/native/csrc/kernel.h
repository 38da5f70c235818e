// What all kernels share that are registered with the dispatcher: arguments as they take them, and the reference in PyTorch,
// for what they leave to it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>

namespace sidrec {

using OptionalTensor = std::optional<at::Tensor>;

// Contiguous, and integers of any width as int64.
inline at::Tensor ready(const at::Tensor& x) { return (x.is_floating_point() ? x : x.to(at::kLong)).contiguous(); }
inline OptionalTensor ready(const OptionalTensor& x) { return x ? OptionalTensor(ready(*x)) : x; }

// Whether a kernel may run, on values of this dtype; asked at each call, as kernels.py does.
inline bool may_run(const at::Tensor& values, std::initializer_list<at::ScalarType> dtypes) {
  const char* asked = std::getenv("SIDREC_OPS");
  if (asked && std::strcmp(asked, "reference") == 0) return false;
  return std::find(dtypes.begin(), dtypes.end(), values.scalar_type()) != dtypes.end();
}

// What the reference gives in a kernel's place, or says of arguments that neither takes. It runs in Python.
template <typename... Args>
torch::jit::Stack reference(const char* name, const Args&... args) {
  torch::jit::Stack stack;
  (stack.emplace_back(args), ...);
  c10::Dispatcher::singleton().findSchemaOrThrow((std::string("sidrec_reference::") + name).c_str(), "").callBoxed(stack);
  return stack;
}

inline int64_t sum(at::IntArrayRef numbers) {
  int64_t total = 0;
  for (int64_t number : numbers) total += number;
  return total;
}

inline bool has_shape(const at::Tensor& x, std::initializer_list<int64_t> shape) { return x.sizes() == at::IntArrayRef(shape); }
inline bool has_shape(const OptionalTensor& x, std::initializer_list<int64_t> shape) { return !x || has_shape(*x, shape); }

} // namespace sidrec
