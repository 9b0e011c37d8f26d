// LSMM (Section 3.4): the weighted sum of a 7x3 and a 3x7 depthwise convolution and the input. The weights, a softmax
// per channel and image, come from a small MLP on their average.
//
// Everything but these weights is linear in the input. So the sums of the input under each tap give the average, and
// the weighted sum is one convolution with a cross-shaped kernel per image.
#include <ATen/ops/addmm.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "layers.h"

namespace mmstrip {
namespace {

// Outline of the union of the 7x3 and the 3x7 kernel, as widths of its rows.
constexpr int64_t CROSS[] = {3, 3, 7, 7, 7, 3, 3};
constexpr int64_t SIDE = 7, BAR = 3, CENTRE = 16, PATHS = 3;
constexpr int64_t CROSS_TAPS = 33, KERNEL_TAPS = SIDE * BAR;

// function(tap of the cross, tap of the kernel) for the taps of the tall or the wide kernel.
template <typename Function>
void for_taps(bool tall, Function function) {
  int64_t tap = 0;
  for (const auto row : irange(SIDE)) {
    for (const auto k : irange(CROSS[row])) {
      const bool long_row = CROSS[row] == SIDE;
      const int64_t column = k - (long_row ? (SIDE - BAR) / 2 : 0);  // of the tall kernel
      if (tall && column >= 0 && column < BAR) function(tap, row * BAR + column);
      if (!tall && long_row) function(tap, (row - (SIDE - BAR) / 2) * SIDE + k);
      ++tap;
    }
  }
}

// The kernels of the three paths (3, C, taps) as crosses.
Tensor crosses(const Tensor& tall, const Tensor& wide) {
  const Tensor first = checked(tall, "tall", {ANY, 1, SIDE, BAR});
  const int64_t channels = first.size(0);
  const Tensor kernels[] = {first, checked(wide, "wide", {channels, 1, BAR, SIDE})};
  const Tensor out = at::zeros({PATHS, channels, CROSS_TAPS}, first.options());
  float* to = mutable_data(out);
  for (const auto path : irange(2)) {
    const float* from = data(kernels[path]);
    for (int64_t c = 0; c < channels; ++c, to += CROSS_TAPS, from += KERNEL_TAPS) {
      for_taps(path == 0, [&](int64_t tap, int64_t own) { to[tap] = from[own]; });
    }
  }
  for (int64_t c = 0; c < channels; ++c) to[c * CROSS_TAPS + CENTRE] = 1;
  return out;
}

// The taps of the tall or the wide kernels, from crosses (C, taps).
Tensor kernels_of(const Tensor& crosses, bool tall, const Tensor& like) {
  const Tensor out = at::empty(like.sizes(), crosses.options());
  const float* from = data(crosses);
  float* to = mutable_data(out);
  for (int64_t c = 0; c < crosses.size(0); ++c, from += CROSS_TAPS, to += KERNEL_TAPS) {
    for_taps(tall, [&](int64_t tap, int64_t own) { to[own] = from[tap]; });
  }
  return out;
}

// Weights (M, C, 1, 1) and (3 C, M, 1, 1) of the MLP as matrices.
std::tuple<Tensor, Tensor> checked_mlp(const Tensor& narrow, const Tensor& broad, int64_t channels) {
  check(narrow, "narrow", {ANY, channels, 1, 1});
  TORCH_CHECK(narrow.numel() > 0, "narrow must not be empty, but has shape ", narrow.sizes());
  check(broad, "broad", {PATHS * channels, narrow.size(0), 1, 1});
  return {narrow.to(at::kFloat).flatten(1), broad.to(at::kFloat).flatten(1)};
}

// function(index of image and channel, channel) in parallel.
template <typename Function>
void for_channels(int64_t images, int64_t channels, Function function) {
  at::parallel_for(0, images * channels, 256, [&](int64_t begin, int64_t end) {
    for (const auto at : irange(begin, end)) function(at, at % channels);
  });
}

// Sums (N, C, taps) of the paths' crosses with weights (N, C, 3).
Tensor combine(const Tensor& crosses, const Tensor& weights) {
  const int64_t images = weights.size(0), channels = weights.size(1), path = channels * CROSS_TAPS;
  const Tensor out = at::empty({images, channels, CROSS_TAPS}, crosses.options());
  const float *first_cross = data(crosses), *first_weight = data(weights);
  float* first_out = mutable_data(out);
  for_channels(images, channels, [=](int64_t at, int64_t c) {
    const float* cross = first_cross + c * CROSS_TAPS;
    const float* weight = first_weight + at * PATHS;
    float* to = first_out + at * CROSS_TAPS;
    for (const auto tap : irange(CROSS_TAPS)) to[tap] = weight[0] * cross[tap] + weight[1] * cross[path + tap];
    to[CENTRE] += weight[2];
  });
  return out;
}

float dot(const float* a, const float* b) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t tap = 0; tap < CROSS_TAPS; ++tap) sum += a[tap] * b[tap];
  return sum;
}

// Softmax over three values.
void softmax(const float* logits, float* out) {
  const float most = std::max({logits[0], logits[1], logits[2]});
  float sum = 0;
  for (const auto path : irange(PATHS)) sum += out[path] = std::exp(logits[path] - most);
  for (const auto path : irange(PATHS)) out[path] /= sum;
}

// Gradient of the logits from that of the softmax.
void softmax_backward(const float* grad, const float* softmax, float* out) {
  float mean = 0;
  for (const auto path : irange(PATHS)) mean += grad[path] * softmax[path];
  for (const auto path : irange(PATHS)) out[path] = (grad[path] - mean) * softmax[path];
}

}  // namespace

LocalStrips::LocalStrips(const Tensor& tall, const Tensor& wide, const Tensor& narrow, const Tensor& narrow_bias,
                         const Tensor& broad, const Tensor& broad_bias)
    : paths_(crosses(tall, wide)), all_(paths_.sum(0)) {
  std::tie(narrow_, broad_) = checked_mlp(narrow, broad, tall.size(0));
  narrow_bias_ = checked(narrow_bias, "narrow_bias", {narrow.size(0)});
  broad_bias_ = checked(broad_bias, "broad_bias", {broad.size(0)});
}

LocalStrips::Result LocalStrips::run(const Tensor& u) const {
  const int64_t images = u.size(0), channels = u.size(1), count = u.size(2) * u.size(3);
  const Tensor sums = tap_sums(u, CROSS), average = at::empty({images, channels}, sums.options());
  const Tensor weights = at::empty({images, channels, PATHS}, sums.options());
  const float *sum = data(sums), *cross = data(all_);
  float* to_average = mutable_data(average);
  for_channels(images, channels, [=](int64_t at, int64_t c) {
    to_average[at] = dot(sum + at * CROSS_TAPS, cross + c * CROSS_TAPS) / count;
  });
  const Tensor hidden = at::addmm(narrow_bias_, average, narrow_.t());
  const Tensor logits = at::addmm(broad_bias_, at::gelu(hidden), broad_.t());
  const float* logit = data(logits);
  float* weight = mutable_data(weights);
  for_channels(images, channels, [=](int64_t at, int64_t) { softmax(logit + at * PATHS, weight + at * PATHS); });
  return {depthwise(u, PackedKernels(combine(paths_, weights), CROSS)), sums, average, hidden, weights};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local_strips(const Tensor& u, const Tensor& tall, const Tensor& wide,
                                                                const Tensor& narrow, const Tensor& narrow_bias,
                                                                const Tensor& broad, const Tensor& broad_bias) {
  const BelowAutograd guard;
  check(tall, "tall", {ANY, 1, SIDE, BAR});
  check_map(u, "u", {ANY, tall.size(0), ANY, ANY});
  const LocalStrips layer(tall, wide, narrow, narrow_bias, broad, broad_bias);
  const auto [out, sums, average, hidden, weights] = layer.run(in_channels_last(u));
  return {out, sums, average, hidden, weights};
}

// Gradients (2, C, taps) of the tall and wide kernels as crosses: from those of each image's kernel (N, C, taps), by
// the weights of the paths, and from those of the sums under the taps, by the sum of all paths.
Tensor cross_grads(const Tensor& grad_kernels, const Tensor& weights, const Tensor& grad_average, const Tensor& sums) {
  const int64_t images = weights.size(0), channels = weights.size(1), path = channels * CROSS_TAPS;
  const Tensor out = at::zeros({2, channels, CROSS_TAPS}, weights.options());
  const float *kernel = data(grad_kernels), *weight = data(weights), *average = data(grad_average), *sum = data(sums);
  float* first_out = mutable_data(out);
  for_channels(1, channels, [=](int64_t, int64_t c) {
    float* to = first_out + c * CROSS_TAPS;
    for (const auto image : irange(images)) {
      const int64_t at = image * channels + c, first = at * CROSS_TAPS;
      for (const auto tap : irange(CROSS_TAPS)) {
        to[tap] += weight[at * PATHS] * kernel[first + tap] + average[at] * sum[first + tap];
        to[path + tap] += weight[at * PATHS + 1] * kernel[first + tap] + average[at] * sum[first + tap];
      }
    }
  });
  return out;
}

// Gradient (N, 3 C) of the softmax's logits.
Tensor logit_grads(const Tensor& grad_kernels, const Tensor& paths, const Tensor& weights) {
  const int64_t images = weights.size(0), channels = weights.size(1), path = channels * CROSS_TAPS;
  const Tensor out = at::empty({images, channels * PATHS}, weights.options());
  const float *kernel = data(grad_kernels), *cross = data(paths), *weight = data(weights);
  float* logit = mutable_data(out);
  for_channels(images, channels, [=](int64_t at, int64_t c) {
    const float* here = kernel + at * CROSS_TAPS;
    const float grad_weight[PATHS] = {dot(here, cross + c * CROSS_TAPS), dot(here, cross + path + c * CROSS_TAPS),
                                      here[CENTRE]};
    softmax_backward(grad_weight, weight + at * PATHS, logit + at * PATHS);
  });
  return out;
}

// Gradient of u, from those of the output and of the sums under the taps.
Tensor input_grad(const Tensor& grad, const Tensor& paths, const Tensor& weights, const Tensor& grad_sums) {
  // Weight of a pixel in the average; smaller at the borders, where not every tap covers it.
  const Tensor ones = empty_map({1, grad.size(1), grad.size(2), grad.size(3)}, at::kFloat).fill_(1);
  const Tensor seen = depthwise(ones, PackedKernels(paths.sum(0, true).flip(2), CROSS));
  return depthwise(grad, PackedKernels(combine(paths, weights).flip(2), CROSS), nullptr, seen, grad_sums);
}

// Gradients of u, tall, wide, narrow, narrow_bias, broad and broad_bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_strips_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& tall, const Tensor& wide, const Tensor& narrow,
    const Tensor& broad, const Tensor& saved_sums, const Tensor& saved_average, const Tensor& saved_hidden,
    const Tensor& saved_weights, std::array<bool, 7> required) {
  const BelowAutograd guard;
  check_map(input, "u"), check_map(grad_out, "grad", input.sizes());
  const int64_t images = input.size(0), channels = input.size(1);
  check(tall, "tall", {channels, 1, SIDE, BAR});
  const Tensor paths = crosses(tall, wide);
  const auto [narrow_matrix, broad_matrix] = checked_mlp(narrow, broad, channels);
  const Tensor sums = checked(saved_sums, "sums", {images, channels, CROSS_TAPS});
  const Tensor average = checked(saved_average, "average", {images, channels});
  const Tensor hidden = checked(saved_hidden, "hidden", {images, narrow.size(0)});
  const Tensor weights = checked(saved_weights, "weights", {images, channels, PATHS});
  const Tensor u = in_channels_last(input), grad = in_channels_last(grad_out);

  const auto [u_required, tall_required, wide_required, narrow_required, narrow_bias_required, broad_required,
              broad_bias_required] = required;
  const bool sums_required = u_required || tall_required || wide_required;
  const bool hidden_required = sums_required || narrow_required || narrow_bias_required;
  if (!hidden_required && !broad_required && !broad_bias_required) return {};
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> out;
  auto& [grad_u, grad_tall, grad_wide, grad_narrow, grad_narrow_bias, grad_broad, grad_broad_bias] = out;
  const Tensor grad_kernels = depthwise_weight_grad(grad, u, CROSS);
  const Tensor grad_logits = logit_grads(grad_kernels, paths, weights);
  if (broad_required) grad_broad = grad_logits.t().mm(at::gelu(hidden)).view(broad.sizes());
  if (broad_bias_required) grad_broad_bias = grad_logits.sum(0);
  if (!hidden_required) return out;
  const Tensor grad_hidden = at::gelu_backward(grad_logits.mm(broad_matrix), hidden);
  if (narrow_required) grad_narrow = grad_hidden.t().mm(average).view(narrow.sizes());
  if (narrow_bias_required) grad_narrow_bias = grad_hidden.sum(0);
  if (!sums_required) return out;
  const Tensor grad_sums = grad_hidden.mm(narrow_matrix).div_(u.size(2) * u.size(3));
  if (u_required) grad_u = input_grad(grad, paths, weights, grad_sums);
  if (!tall_required && !wide_required) return out;
  const Tensor grads = cross_grads(grad_kernels, weights, grad_sums, sums);
  if (tall_required) grad_tall = kernels_of(grads[0], true, tall);
  if (wide_required) grad_wide = kernels_of(grads[1], false, wide);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def(
      "local_strips(Tensor u, Tensor tall, Tensor wide, Tensor narrow, Tensor narrow_bias, Tensor broad,"
      " Tensor broad_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "local_strips_backward(Tensor grad, Tensor u, Tensor tall, Tensor wide, Tensor narrow, Tensor broad,"
      " Tensor sums, Tensor average, Tensor hidden, Tensor weights, bool[7] required)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("local_strips", local_strips);
  library.impl("local_strips_backward", local_strips_backward);
}

}  // namespace mmstrip
