// Operators that others are made of, so that these need not go through the dispatcher.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "kernel.h"

namespace sidrec {

at::Tensor scaled_decode(const at::Tensor& words, const at::Tensor& table, const at::Tensor& scale,
                         at::IntArrayRef radices, at::IntArrayRef chunk_words, int64_t scaled_chunks);

std::tuple<at::Tensor, at::Tensor> code_attention(
    const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end, const at::Tensor& scores,
    const OptionalTensor& event_time, const OptionalTensor& query_time, const OptionalTensor& scale,
    at::IntArrayRef radices, at::IntArrayRef digit_words, int64_t scaled_digits, bool softmax);

} // namespace sidrec
