// LSMM (Section 3.4): a 7x3 and a 3x7 depthwise convolution and the input itself, in a sum whose weights, a softmax for
// each channel and image, a small MLP draws from their average.
//
// All of it is linear in the input but for these weights. So sums of the input under each tap give the average, and one
// convolution with a kernel for each image, in the shape of a cross, is the weighted sum.
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "maps.h"
#include "steps.h"

namespace mmstrip {
namespace {

// Outline of the 7x3 and the 3x7 kernel on each other, as widths of its rows.
constexpr int64_t CROSS[] = {3, 3, 7, 7, 7, 3, 3};
constexpr int64_t SIDE = 7, BAR = 3, CENTRE = 16, PATHS = 3;
constexpr int64_t CROSS_TAPS = 33, KERNEL_TAPS = SIDE * BAR;

// function(tap of the cross, tap of a kernel) for the taps of the tall or of the wide kernel.
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
  const int64_t channels = tall.size(0);
  const Tensor out = at::zeros({PATHS, channels, CROSS_TAPS}, tall.options());
  const Tensor kernels[] = {tall.contiguous(), wide.contiguous()};
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

// The taps of the tall or of the wide kernels, of crosses (C, taps).
Tensor kernels_of(const Tensor& crosses, bool tall, const Tensor& like) {
  const Tensor out = at::empty(like.sizes(), crosses.options());
  const float* from = data(crosses);
  float* to = mutable_data(out);
  for (int64_t c = 0; c < crosses.size(0); ++c, from += CROSS_TAPS, to += KERNEL_TAPS) {
    for_taps(tall, [&](int64_t tap, int64_t own) { to[own] = from[tap]; });
  }
  return out;
}

// function(place of image and channel, channel) in parallel.
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

// Softmax of threes.
void softmax(const float* logits, float* out) {
  const float most = std::max({logits[0], logits[1], logits[2]});
  float sum = 0;
  for (const auto path : irange(PATHS)) sum += out[path] = std::exp(logits[path] - most);
  for (const auto path : irange(PATHS)) out[path] /= sum;
}

// Gradient of the logits from that of their softmax.
void softmax_backward(const float* grad, const float* softmax, float* out) {
  float mean = 0;
  for (const auto path : irange(PATHS)) mean += grad[path] * softmax[path];
  for (const auto path : irange(PATHS)) out[path] = (grad[path] - mean) * softmax[path];
}

}  // namespace

LocalStrips::LocalStrips(const Tensor& tall, const Tensor& wide, const Tensor& narrow, const Tensor& narrow_bias,
                         const Tensor& broad, const Tensor& broad_bias)
    : paths_(crosses(tall, wide)),
      all_(paths_.sum(0)),
      narrow_(narrow.flatten(1).t()),
      narrow_bias_(narrow_bias),
      broad_(broad.flatten(1).t()),
      broad_bias_(broad_bias) {}

LocalStrips::Result LocalStrips::run(const Tensor& u) const {
  TORCH_CHECK(u.size(1) == paths_.size(1), "kernels of ", paths_.size(1), " channels do not fit a map ", u.sizes());
  const int64_t images = u.size(0), channels = u.size(1), count = u.size(2) * u.size(3);
  const Tensor sums = tap_sums(u, CROSS), average = at::empty({images, channels}, u.options());
  const Tensor weights = at::empty({images, channels, PATHS}, u.options());
  const float *sum = data(sums), *cross = data(all_);
  float* to_average = mutable_data(average);
  for_channels(images, channels, [=](int64_t at, int64_t c) {
    to_average[at] = dot(sum + at * CROSS_TAPS, cross + c * CROSS_TAPS) / count;
  });
  const Tensor hidden = at::addmm(narrow_bias_, average, narrow_);
  const Tensor logits = at::addmm(broad_bias_, at::gelu(hidden), broad_);
  const float* logit = data(logits);
  float* weight = mutable_data(weights);
  for_channels(images, channels, [=](int64_t at, int64_t) { softmax(logit + at * PATHS, weight + at * PATHS); });
  return {depthwise(u, Taps(combine(paths_, weights), CROSS)), sums, average, hidden, weights};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local_strips(const Tensor& u, const Tensor& tall, const Tensor& wide,
                                                                const Tensor& narrow, const Tensor& narrow_bias,
                                                                const Tensor& broad, const Tensor& broad_bias) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto [out, sums, average, hidden, weights] =
      LocalStrips(tall, wide, narrow, narrow_bias, broad, broad_bias).run(channels_last(u));
  return {out, sums, average, hidden, weights};
}

// Gradients of all arguments.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_strips_backward(
    const Tensor& any_grad, const Tensor& any, const Tensor& tall, const Tensor& wide, const Tensor& narrow,
    const Tensor& broad, const Tensor& sums, const Tensor& average, const Tensor& hidden, const Tensor& weights) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor u = channels_last(any), grad = channels_last(any_grad), paths = crosses(tall, wide);
  const int64_t images = u.size(0), channels = u.size(1), path = channels * CROSS_TAPS;
  const Tensor grad_kernels = depthwise_weight_grad(grad, u, CROSS);
  const Tensor grad_logits = at::empty({images, channels * PATHS}, u.options());
  const float *kernel = data(grad_kernels), *cross = data(paths), *weight = data(weights), *sum = data(sums);
  float* logit = mutable_data(grad_logits);
  for_channels(images, channels, [=](int64_t at, int64_t c) {
    const float* here = kernel + at * CROSS_TAPS;
    const float grad_weight[PATHS] = {dot(here, cross + c * CROSS_TAPS), dot(here, cross + path + c * CROSS_TAPS),
                                      here[CENTRE]};
    softmax_backward(grad_weight, weight + at * PATHS, logit + at * PATHS);
  });
  const Tensor grad_hidden = at::gelu_backward(grad_logits.mm(broad.flatten(1)), hidden);
  const Tensor grad_total = grad_hidden.mm(narrow.flatten(1)).div_(u.size(2) * u.size(3));

  const Tensor grad_crosses = at::zeros({2, channels, CROSS_TAPS}, u.options());
  const float* total = data(grad_total);
  float* out = mutable_data(grad_crosses);
  for_channels(1, channels, [=](int64_t, int64_t c) {
    float* to = out + c * CROSS_TAPS;
    for (const auto image : irange(images)) {
      const int64_t at = image * channels + c, first = at * CROSS_TAPS;
      for (const auto tap : irange(CROSS_TAPS)) {
        to[tap] += weight[at * PATHS] * kernel[first + tap] + total[at] * sum[first + tap];
        to[path + tap] += weight[at * PATHS + 1] * kernel[first + tap] + total[at] * sum[first + tap];
      }
    }
  });
  // What a pixel weighs in the average: less at the borders, where not every tap sees it.
  const Tensor ones = channels_last(at::ones({1, u.size(1), u.size(2), u.size(3)}, u.options()));
  const Tensor seen = depthwise(ones, Taps(paths.sum(0, true).flip(2), CROSS));
  const Tensor grad_u = depthwise(grad, Taps(combine(paths, weights).flip(2), CROSS), nullptr, seen, grad_total);
  return {grad_u,
          kernels_of(grad_crosses[0], true, tall),
          kernels_of(grad_crosses[1], false, wide),
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
