// LSMM (Section 3.4): a 7x3 and a 3x7 depthwise convolution and the input itself, in a sum whose weights, a softmax for
// each channel and image, a small MLP draws from their average.
//
// All of it is linear in the input but for these weights. So sums of the input under each tap give the average, and one
// convolution with a kernel for each image, in the shape of a cross, is the weighted sum.
#include <torch/library.h>

#include "maps.h"

namespace mmstrip {
namespace {

using c10::irange;

// Outline of the 7x3 and the 3x7 kernel on each other, as widths of its rows.
constexpr int64_t CROSS[] = {3, 3, 7, 7, 7, 3, 3};
constexpr int64_t SIDE = 7, BAR = 3, CENTRE = 16, PATHS = 3;
constexpr int64_t CROSS_TAPS = 33, KERNEL_TAPS = SIDE * BAR;

// function(tap of the cross, tap of the tall kernel or -1, tap of the wide kernel or -1)
template <typename Function>
void for_taps(Function function) {
  int64_t tap = 0;
  for (const auto row : irange(SIDE)) {
    const bool inside = CROSS[row] == SIDE;  // of the wide kernel
    for (const auto k : irange(CROSS[row])) {
      const int64_t column = k - (inside ? 2 : 0);  // of the tall kernel
      const bool covered = column >= 0 && column < BAR;
      function(tap++, covered ? row * BAR + column : -1, inside ? (row - 2) * SIDE + k : -1);
    }
  }
}

// The paths' kernels of one channel in a weighted sum.
void combine(const float* tall, const float* wide, const float* weight, float* out) {
  for_taps([&](int64_t tap, int64_t in_tall, int64_t in_wide) {
    out[tap] = (in_tall < 0 ? 0 : weight[0] * tall[in_tall]) + (in_wide < 0 ? 0 : weight[1] * wide[in_wide]);
  });
  out[CENTRE] += weight[2];
}

// Products of a kernel with those of the paths.
void project(const float* kernel, const float* tall, const float* wide, float* out) {
  out[0] = out[1] = 0;
  for_taps([&](int64_t tap, int64_t in_tall, int64_t in_wide) {
    if (in_tall >= 0) out[0] += kernel[tap] * tall[in_tall];
    if (in_wide >= 0) out[1] += kernel[tap] * wide[in_wide];
  });
  out[2] = kernel[CENTRE];
}

struct Paths {
  Tensor tall, wide;
  int64_t images, channels;

  Paths(const Tensor& u, const Tensor& tall, const Tensor& wide)
      : tall(tall.contiguous()), wide(wide.contiguous()), images(u.size(0)), channels(u.size(1)) {}

  // function(channel, its tall kernel, its wide kernel)
  template <typename Function>
  void for_each(Function function) const {
    for (const auto c : irange(channels)) function(c, data(tall) + c * KERNEL_TAPS, data(wide) + c * KERNEL_TAPS);
  }

  // Kernels (N, C, taps) for weights (N, C, 3), or (1, C, taps) with all weights 1.
  Tensor kernels(const Tensor& weights) const {
    const int64_t count = weights.defined() ? images : 1;
    const Tensor out = at::empty({count, channels, CROSS_TAPS}, tall.options());
    constexpr float ones[PATHS] = {1, 1, 1};
    for_each([&](int64_t c, const float* tall_kernel, const float* wide_kernel) {
      for (const auto image : irange(count)) {
        const int64_t at = image * channels + c;
        const float* weight = weights.defined() ? data(weights) + at * PATHS : ones;
        combine(tall_kernel, wide_kernel, weight, mutable_data(out) + at * CROSS_TAPS);
      }
    });
    return out;
  }
};

// Also gives the sums under each tap (N, C, taps), the average (N, C), the MLP's hidden values before GELU (N, C / 2) and
// the weights of the paths (N, C, 3).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local_strips(const Tensor& any, const Tensor& tall, const Tensor& wide,
                                                                const Tensor& narrow, const Tensor& narrow_bias,
                                                                const Tensor& broad, const Tensor& broad_bias) {
  const Tensor u = channels_last(any);
  const Paths paths(u, tall, wide);
  const Tensor sums = tap_sums(u, CROSS);
  const Tensor average = (sums * paths.kernels({})).sum(2).div_(u.size(2) * u.size(3));
  const Tensor hidden = at::addmm(narrow_bias, average, narrow.flatten(1).t());
  const Tensor logits = at::addmm(broad_bias, at::gelu(hidden), broad.flatten(1).t());
  const Tensor weights = logits.view({paths.images, paths.channels, PATHS}).softmax(2);
  return {depthwise(u, paths.kernels(weights), CROSS), sums, average, hidden, weights};
}

// Gradients of all arguments.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_strips_backward(
    const Tensor& any_grad, const Tensor& any, const Tensor& tall, const Tensor& wide, const Tensor& narrow,
    const Tensor& broad, const Tensor& sums, const Tensor& average, const Tensor& hidden, const Tensor& weights) {
  const Tensor u = channels_last(any), grad = channels_last(any_grad);
  const Paths paths(u, tall, wide);
  const int64_t pixel_count = u.size(2) * u.size(3);
  const Tensor grad_kernels = depthwise_weight_grad(grad, u, CROSS);
  const Tensor grad_weights = at::empty_like(weights);
  paths.for_each([&](int64_t c, const float* tall_kernel, const float* wide_kernel) {
    for (const auto image : irange(paths.images)) {
      const int64_t at = image * paths.channels + c;
      project(data(grad_kernels) + at * CROSS_TAPS, tall_kernel, wide_kernel, mutable_data(grad_weights) + at * PATHS);
    }
  });
  const Tensor grad_logits = at::_softmax_backward_data(grad_weights, weights, 2, at::kFloat).flatten(1);
  const Tensor grad_hidden = at::gelu_backward(grad_logits.mm(broad.flatten(1)), hidden);
  const Tensor grad_total = grad_hidden.mm(narrow.flatten(1)).div_(pixel_count);

  const Tensor grad_tall = at::zeros_like(paths.tall), grad_wide = at::zeros_like(paths.wide);
  for (const auto image : irange(paths.images)) {
    for (const auto c : irange(paths.channels)) {
      const int64_t at = image * paths.channels + c;
      const float* kernel = data(grad_kernels) + at * CROSS_TAPS;
      const float* sum = data(sums) + at * CROSS_TAPS;
      const float* weight = data(weights) + at * PATHS;
      const float total = data(grad_total)[at];
      float* to_tall = mutable_data(grad_tall) + c * KERNEL_TAPS;
      float* to_wide = mutable_data(grad_wide) + c * KERNEL_TAPS;
      for_taps([&](int64_t tap, int64_t in_tall, int64_t in_wide) {
        if (in_tall >= 0) to_tall[in_tall] += weight[0] * kernel[tap] + total * sum[tap];
        if (in_wide >= 0) to_wide[in_wide] += weight[1] * kernel[tap] + total * sum[tap];
      });
    }
  }
  // What a pixel weighs in the average: less at the borders, where not every tap sees it.
  const Tensor ones = channels_last(at::ones({1, u.size(1), u.size(2), u.size(3)}, u.options()));
  const Tensor seen = depthwise(ones, paths.kernels({}).flip(2), CROSS);
  const Tensor grad_u = depthwise(grad, paths.kernels(weights).flip(2), CROSS, nullptr, seen, grad_total);
  return {grad_u,
          grad_tall,
          grad_wide,
          grad_hidden.t().mm(average).view(narrow.sizes()),
          grad_hidden.sum(0),
          grad_logits.t().mm(at::gelu(hidden)).view(broad.sizes()),
          grad_logits.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("local_strips(Tensor u, Tensor tall, Tensor wide, Tensor narrow, Tensor narrow_bias, Tensor broad,"
              " Tensor broad_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("local_strips_backward(Tensor grad, Tensor u, Tensor tall, Tensor wide, Tensor narrow, Tensor broad,"
              " Tensor sums, Tensor average, Tensor hidden, Tensor weights)"
              " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("local_strips", local_strips);
  library.impl("local_strips_backward", local_strips_backward);
}

}  // namespace mmstrip
