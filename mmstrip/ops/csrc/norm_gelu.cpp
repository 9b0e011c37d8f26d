// BN and GELU with their gradients, in as few passes over memory as possible.
#include "batch_norm.h"
#include "gelu.h"
#include "parallel.h"

namespace mmstrip {
namespace {

Slices slices_of_map(const Tensor& x) { return Slices(1, x.size(0) * x.size(2) * x.size(3), x.size(1)); }

// Mean and biased variance (C, ) of a map of T, combined from those of slices.
template <typename T>
void channel_moments(const Tensor& x, float* mean, float* variance) {
  const Slices slices = slices_of_map(x);
  const int64_t channels = slices.channels;
  TORCH_CHECK(slices.pixels > 1, "BN in training needs more than one value per channel, but the map has shape ",
              x.sizes());
  const Tensor sums = slices.sums(), squares = slices.sums();
  const auto size_of = [&](int64_t slice) { return std::min(SLICE, slices.pixels - slice * SLICE); };
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    float* square = mutable_data(squares) + slice * channels;
    const T* from = data<T>(x);
    for (int64_t pixel = first; pixel < end; ++pixel) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        add_to(sum + c, load(from + pixel * channels + c, lanes), lanes);
      });
    }
    const float share = 1.0f / (end - first);
    for (int64_t pixel = first; pixel < end; ++pixel) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes distance = load(from + pixel * channels + c, lanes) - load(sum + c, lanes) * share;
        add_to(square + c, distance * distance, lanes);
      });
    }
  });
  std::fill_n(mean, channels, 0.0f);
  std::fill_n(variance, channels, 0.0f);
  const float share = 1.0f / slices.pixels;
  for (const auto slice : irange(slices.count)) {
    const float* sum = data(sums) + slice * channels;
    for (const auto c : irange(channels)) mean[c] += sum[c] * share;
  }
  for (const auto slice : irange(slices.count)) {
    const float size = size_of(slice);
    const float* sum = data(sums) + slice * channels;
    const float* square = data(squares) + slice * channels;
    for (const auto c : irange(channels)) {
      const float distance = sum[c] / size - mean[c];
      variance[c] += (square[c] + distance * distance * size) * share;
    }
  }
}

// grad * scale + x * slope + offset in place of grad; the last three (C, ).
template <typename T>
void combine(const Tensor& grad, const Tensor& x, const float* scale, const float* slope, const float* offset) {
  const int64_t channels = x.size(1);
  at::parallel_for(0, x.size(0) * x.size(2) * x.size(3), 64, [&](int64_t begin, int64_t end) {
    const T* from = data<T>(x) + begin * channels;
    T* to = mutable_data<T>(grad) + begin * channels;
    for (int64_t pixel = begin; pixel < end; ++pixel, from += channels, to += channels) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes moved = load(from + c, lanes) * load(slope + c, lanes) + load(offset + c, lanes);
        store(to + c, load(to + c, lanes) * load(scale + c, lanes) + moved, lanes);
      });
    }
  });
}

// Update running statistics, which may be strided views.
void update(const Tensor& statistics, const Tensor& updated) {
  if (!updated.is_same(statistics)) statistics.copy_(updated);
  if (!statistics.is_inference()) statistics.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

BatchNorm batch_norm(const BatchNormLayer& layer, int64_t channels, const Tensor& x, const OptionalTensor& bias) {
  const Tensor weight = checked(layer.weight, "norm_weight", {channels});
  const Tensor offset = checked(layer.bias, "norm_bias", {channels});
  const Tensor running_mean = checked(layer.running_mean, "mean", {channels});
  const Tensor running_variance = checked(layer.running_variance, "variance", {channels});
  const OptionalTensor addend = checked(bias, "bias", {channels});
  const Tensor values = at::empty({4, channels}, weight.options());
  float* mean = mutable_data(values);
  float *inverse = mean + channels, *scale = inverse + channels, *shift = scale + channels;
  if (layer.training) {
    with_type(x.scalar_type(), [&](auto type) { channel_moments<decltype(type)>(x, mean, inverse); });
    const float unbiased = float(x.numel() / channels) / (x.numel() / channels - 1), momentum = layer.momentum;
    float *to_mean = mutable_data(running_mean), *to_variance = mutable_data(running_variance);
    for (const auto c : irange(channels)) {
      to_mean[c] = (1 - momentum) * to_mean[c] + momentum * (mean[c] + (addend ? data(*addend)[c] : 0.0f));
      to_variance[c] = (1 - momentum) * to_variance[c] + momentum * (inverse[c] * unbiased);
    }
    update(layer.running_mean, running_mean);
    update(layer.running_variance, running_variance);
  } else {
    for (const auto c : irange(channels)) {
      mean[c] = data(running_mean)[c] - (addend ? data(*addend)[c] : 0.0f);
      inverse[c] = data(running_variance)[c];
    }
  }
  for (const auto c : irange(channels)) {
    inverse[c] = 1.0f / std::sqrt(inverse[c] + float(layer.eps));
    scale[c] = data(weight)[c] * inverse[c];
    shift[c] = data(offset)[c] - mean[c] * scale[c];
  }
  return {values, layer.training};
}

namespace {

template <typename T>
void norm_gelu(const Tensor& x, const BatchNorm& norm, at::TensorList out) {
  const int64_t channels = x.size(1), width = channels / out.size();
  at::parallel_for(0, x.numel() / channels, 64, [&](int64_t begin, int64_t end) {
    for (const auto chunk : irange(out.size())) {
      const T* from = data<T>(x) + begin * channels + chunk * width;
      const float* scale = norm.scale() + chunk * width;
      const float* shift = norm.shift() + chunk * width;
      T* to = mutable_data<T>(out[chunk]) + begin * width;
      for (int64_t row = begin; row < end; ++row, from += channels, to += width) {
        for_lanes(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          store(to + c, gelu(load(from + c, lanes) * load(scale + c, lanes) + load(shift + c, lanes)), lanes);
        });
      }
    }
  });
}

}  // namespace

void norm_gelu(const Tensor& x, const BatchNorm& norm, at::TensorList out) {
  with_type(x.scalar_type(), [&](auto type) { norm_gelu<decltype(type)>(x, norm, out); });
}

BatchNormGrad batch_norm_backward(const Tensor& grad, const Tensor& x, const BatchNorm& norm, const Tensor& sums,
                                  const Tensor& products) {
  const int64_t channels = norm.channels(), count = x.numel() / channels;
  const Tensor weight = at::empty({channels}, at::kFloat), rest = at::zeros({2, channels}, at::kFloat);
  float* slope = mutable_data(rest);
  float* offset = slope + channels;
  const float *mean = norm.mean(), *inverse = norm.inverse(), *scale = norm.scale();
  const float *sum = data(sums), *product = data(products);
  float* gradient = mutable_data(weight);
  for (const auto c : irange(channels)) {
    gradient[c] = product[c] * inverse[c];
    if (!norm.training) continue;
    // Through the mean and the variance of x.
    slope[c] = -scale[c] * inverse[c] * gradient[c] / count;
    offset[c] = -scale[c] * sum[c] / count - slope[c] * mean[c];
  }
  if (grad.defined()) {
    with_type(x.scalar_type(), [&](auto type) { combine<decltype(type)>(grad, x, scale, slope, offset); });
  }
  return {grad, weight, sums};
}

namespace {

template <typename T>
BatchNormGrad norm_gelu_backward(at::TensorList grads, const Tensor& x, const BatchNorm& norm, bool x_required) {
  const Slices slices = slices_of_map(x);
  const int64_t channels = slices.channels, width = channels / grads.size();
  const Tensor out = x_required ? empty_map(x) : Tensor();
  const Tensor sums = slices.sums(), products = slices.sums();
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    for (const auto chunk : irange(grads.size())) {
      const int64_t left = chunk * width;
      float* sum = mutable_data(sums) + slice * channels + left;
      float* product = mutable_data(products) + slice * channels + left;
      const float* scale = norm.scale() + left;
      const float* shift = norm.shift() + left;
      const float* mean = norm.mean() + left;
      const T* from = data<T>(x) + first * channels + left;
      const T* grad_out = data<T>(grads[chunk]) + first * width;
      T* to = x_required ? mutable_data<T>(out) + first * channels + left : nullptr;
      for (int64_t pixel = first; pixel < end; ++pixel, from += channels, grad_out += width) {
        for_lanes(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const Lanes value = load(from + c, lanes);
          const Lanes normed = value * load(scale + c, lanes) + load(shift + c, lanes);
          const Lanes grad = load(grad_out + c, lanes) * gelu_slope(normed);
          if (to) store(to + c, grad, lanes);
          add_to(sum + c, grad, lanes);
          add_to(product + c, grad * (value - load(mean + c, lanes)), lanes);
        });
        if (to) to += channels;
      }
    }
  });
  return batch_norm_backward(out, x, norm, sum_rows(sums[0]), sum_rows(products[0]));
}

}  // namespace

BatchNormGrad norm_gelu_backward(at::TensorList grads, const Tensor& x, const BatchNorm& norm, bool x_required) {
  return with_type(x.scalar_type(),
                   [&](auto type) { return norm_gelu_backward<decltype(type)>(grads, x, norm, x_required); });
}

}  // namespace mmstrip
