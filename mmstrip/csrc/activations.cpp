// BN and GELU with their gradients, in as few passes over memory as there can be.
#include "gelu.h"
#include "maps.h"

namespace mmstrip {
namespace {

Slices slices_of_map(const Tensor& x) {
  return Slices(1, x.size(0) * x.size(2) * x.size(3), x.size(1));
}

// Mean and biased variance (C, ) of a map: those of slices, then of their means.
void channel_moments(const Tensor& x, float* mean, float* variance) {
  const Slices slices = slices_of_map(x);
  const int64_t channels = slices.channels;
  const Tensor sums = slices.sums(x.options()), squares = slices.sums(x.options());
  const auto size_of = [&](int64_t slice) { return std::min(SLICE, slices.pixels - slice * SLICE); };
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    float* square = mutable_data(squares) + slice * channels;
    const float* from = data(x);
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
void combine(const Tensor& grad, const Tensor& x, const float* scale, const float* slope, const float* offset) {
  const int64_t channels = x.size(1);
  at::parallel_for(0, x.size(0) * x.size(2) * x.size(3), 64, [&](int64_t begin, int64_t end) {
    const float* from = data(x) + begin * channels;
    float* to = mutable_data(grad) + begin * channels;
    for (int64_t pixel = begin; pixel < end; ++pixel, from += channels, to += channels) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes moved = load(from + c, lanes) * load(slope + c, lanes) + load(offset + c, lanes);
        store(to + c, load(to + c, lanes) * load(scale + c, lanes) + moved, lanes);
      });
    }
  });
}

}  // namespace

Tensor sum_rows(const Tensor& any) {
  const Tensor matrix = any.contiguous();
  const Slices slices(1, matrix.size(0), matrix.size(1));
  const int64_t channels = slices.channels;
  const Tensor sums = slices.sums(matrix.options()), out = at::zeros({channels}, matrix.options());
  const auto add_rows = [channels](const float* from, int64_t first, int64_t end, float* sum) {
    for (int64_t row = first; row < end; ++row) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        add_to(sum + c, load(from + row * channels + c, lanes), lanes);
      });
    }
  };
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    add_rows(data(matrix), first, end, mutable_data(sums) + slice * channels);
  });
  add_rows(data(sums), 0, slices.count, mutable_data(out));
  return out;
}

BatchNorm batch_norm(const Tensor& x, const OptionalTensor& bias, const BatchNormLayer& layer) {
  const int64_t channels = layer.weight.numel(), count = layer.training ? x.numel() / channels : 0;
  TORCH_CHECK(!x.defined() || x.size(1) == channels, "BN of ", channels, " channels does not fit a map ", x.sizes());
  const Tensor values = at::empty({4, channels}, layer.weight.options());
  float* mean = mutable_data(values);
  float *inverse = mean + channels, *scale = inverse + channels, *shift = scale + channels;
  if (layer.training) channel_moments(x, mean, inverse);
  const float momentum = layer.momentum, unbiased = float(count) / std::max<int64_t>(count - 1, 1);
  const float* weight = data(layer.weight);
  const float* offset = data(layer.bias);
  const float* more = bias ? data(*bias) : nullptr;
  float* running_mean = mutable_data(layer.running_mean);
  float* running_variance = mutable_data(layer.running_variance);
  for (const auto c : irange(channels)) {
    const float added = more ? more[c] : 0.0f;
    if (layer.training) {
      running_mean[c] += momentum * (mean[c] + added - running_mean[c]);
      running_variance[c] += momentum * (inverse[c] * unbiased - running_variance[c]);
    } else {
      mean[c] = running_mean[c] - added;
      inverse[c] = running_variance[c];
    }
    inverse[c] = 1.0f / std::sqrt(inverse[c] + float(layer.eps));
    scale[c] = weight[c] * inverse[c];
    shift[c] = offset[c] - mean[c] * scale[c];
  }
  return {values, layer.training};
}

void norm_gelu(const Tensor& x, const BatchNorm& norm, at::TensorList out) {
  const int64_t channels = x.size(1), width = channels / out.size();
  at::parallel_for(0, x.numel() / channels, 64, [&](int64_t begin, int64_t end) {
    for (const auto part : irange(out.size())) {
      const float* from = data(x) + begin * channels + part * width;
      const float* scale = norm.scale() + part * width;
      const float* shift = norm.shift() + part * width;
      float* to = mutable_data(out[part]) + begin * width;
      for (int64_t row = begin; row < end; ++row, from += channels, to += width) {
        for_lanes(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          store(to + c, gelu(load(from + c, lanes) * load(scale + c, lanes) + load(shift + c, lanes)), lanes);
        });
      }
    }
  });
}

BatchNormGrad batch_norm_backward(const Tensor& grad, const Tensor& x, const BatchNorm& norm, const Tensor& sums,
                                  const Tensor& products) {
  const int64_t channels = norm.channels(), count = x.numel() / channels;
  const Tensor weight = at::empty({channels}, x.options()), rest = at::zeros({2, channels}, x.options());
  float* slope = mutable_data(rest);
  float* offset = slope + channels;
  const float *mean = norm.mean(), *inverse = norm.inverse(), *scale = norm.scale();
  const float *sum = data(sums), *product = data(products);
  float* gradient = mutable_data(weight);
  for (const auto c : irange(channels)) {
    gradient[c] = product[c] * inverse[c];
    if (!norm.training) continue;
    // x moves its mean and its variance too.
    slope[c] = -scale[c] * inverse[c] * gradient[c] / count;
    offset[c] = -scale[c] * sum[c] / count - slope[c] * mean[c];
  }
  combine(grad, x, scale, slope, offset);
  return {grad, weight, sums};
}

BatchNormGrad norm_gelu_backward(at::TensorList any, const Tensor& x, const BatchNorm& norm) {
  const Slices slices = slices_of_map(x);
  const int64_t channels = slices.channels, width = channels / any.size();
  std::vector<Tensor> grads;
  for (const auto& grad : any) grads.push_back(channels_last(grad));
  const Tensor out = empty_map(x), sums = slices.sums(x.options()), products = slices.sums(x.options());
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    for (const auto part : irange(grads.size())) {
      const int64_t left = part * width;
      float* sum = mutable_data(sums) + slice * channels + left;
      float* product = mutable_data(products) + slice * channels + left;
      const float* scale = norm.scale() + left;
      const float* shift = norm.shift() + left;
      const float* mean = norm.mean() + left;
      const float* from = data(x) + first * channels + left;
      const float* above = data(grads[part]) + first * width;
      float* to = mutable_data(out) + first * channels + left;
      for (int64_t pixel = first; pixel < end; ++pixel, from += channels, above += width, to += channels) {
        for_lanes(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const Lanes value = load(from + c, lanes);
          const Lanes normed = value * load(scale + c, lanes) + load(shift + c, lanes);
          const Lanes grad = load(above + c, lanes) * gelu_slope(normed);
          store(to + c, grad, lanes);
          add_to(sum + c, grad, lanes);
          add_to(product + c, grad * (value - load(mean + c, lanes)), lanes);
        });
      }
    }
  });
  return batch_norm_backward(out, x, norm, sum_rows(sums[0]), sum_rows(products[0]));
}

}  // namespace mmstrip
