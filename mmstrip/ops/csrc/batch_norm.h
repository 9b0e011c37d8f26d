// BN, and BN followed by GELU, with their gradients.
#pragma once

#include "tensor.h"

namespace mmstrip {

// BN of x as x * scale + shift: mean, inverse deviation, scale and shift are the rows of a tensor (4, C).
struct BatchNorm {
  Tensor values;
  bool training;

  const float* mean() const { return data(values); }
  const float* inverse() const { return mean() + channels(); }
  const float* scale() const { return inverse() + channels(); }
  const float* shift() const { return scale() + channels(); }
  int64_t channels() const { return values.size(1); }

  // From the tensor that a forward pass returned.
  static BatchNorm saved(const Tensor& values, int64_t channels, bool training) {
    return {checked(values, "norm", {4, channels}), training};
  }
};

// Arguments of a BN layer.
struct BatchNormLayer {
  Tensor weight, bias, running_mean, running_variance;
  bool training;
  double momentum, eps;

  void check(int64_t channels) const {
    mmstrip::check(weight, "norm_weight", {channels}), mmstrip::check(bias, "norm_bias", {channels});
    mmstrip::check(running_mean, "mean", {channels}), mmstrip::check(running_variance, "variance", {channels});
  }
};

struct BatchNormGrad {
  Tensor x, weight, bias;
};

// norm_gelu.cpp

// The layer for a map x with `channels`, to which `bias` (C, ), if any, has yet to be added. In training, computes
// the statistics of x and updates the running ones; otherwise x is not read.
BatchNorm batch_norm(const BatchNormLayer& layer, int64_t channels, const Tensor& x = {},
                     const OptionalTensor& bias = {});

// gelu(BN(x)), in equal chunks of the channels.
void norm_gelu(const Tensor& x, const BatchNorm& norm, at::TensorList out);

// Its gradients; that of x is undefined unless required.
BatchNormGrad norm_gelu_backward(at::TensorList grads, const Tensor& x, const BatchNorm& norm, bool x_required);

// Gradients of BN from two sums (C, ) over the map: of the output's gradient, and of it times x - mean. If the output's
// gradient is given, it becomes the gradient of x in place.
BatchNormGrad batch_norm_backward(const Tensor& grad, const Tensor& x, const BatchNorm& norm, const Tensor& sums,
                                  const Tensor& products);

}  // namespace mmstrip
