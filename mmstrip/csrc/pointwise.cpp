// 1x1 convolutions of concatenated maps, as one matrix product a map, and what follows them.
#include <torch/library.h>

#include <numeric>

#include "gelu.h"
#include "maps.h"
#include "steps.h"

namespace mmstrip {
namespace {

std::vector<Tensor> dense(at::TensorList maps) {
  std::vector<Tensor> out;
  for (const auto& map : maps) out.push_back(channels_last(map));
  return out;
}

// The columns of a weight (O, sum of C_i, 1, 1) that belong to each part of `channels`.
std::vector<Tensor> columns(const Tensor& weight, at::IntArrayRef channels) {
  const int64_t all = std::accumulate(channels.begin(), channels.end(), int64_t(0));
  TORCH_CHECK(weight.numel() == weight.size(0) * all, "a weight ", weight.sizes(), " does not fit maps of ", channels,
              " channels");
  return weight.view({weight.size(0), all}).split_with_sizes(channels, 1);
}

std::vector<int64_t> channels_of(at::TensorList maps) {
  std::vector<int64_t> channels;
  for (const auto& map : maps) channels.push_back(map.size(1));
  return channels;
}

}  // namespace

Pointwise::Pointwise(const Tensor& weight, at::IntArrayRef channels, const OptionalTensor& bias)
    : outputs_(weight.size(0)), bias_(bias.value_or(Tensor())) {
  for (const auto& part : columns(weight, channels)) packed_.emplace_back(part);
}

std::vector<Operand> Pointwise::operands_of(at::TensorList maps) const {
  TORCH_CHECK(maps.size() == packed_.size(), packed_.size(), " maps, not ", maps.size());
  std::vector<Operand> operands;
  for (const auto i : irange(maps.size())) {
    const int64_t channels = packed_[i].depth;
    TORCH_CHECK(maps[i].size(1) == channels && maps[i].numel() / channels == maps[0].numel() / maps[0].size(1),
                "a map ", maps[i].sizes(), " does not fit");
    operands.push_back({data(maps[i]), channels, packed_[i].block(0), channels});
  }
  return operands;
}

Tensor Pointwise::run(at::TensorList maps, const OptionalTensor& residual, Tensor out) const {
  if (!out.defined()) out = empty_map(maps[0], outputs_);
  TORCH_CHECK(!residual || residual->sizes() == out.sizes(), "a residual ", residual ? residual->sizes() : out.sizes(),
              " does not fit a map ", out.sizes());
  const int64_t outputs = outputs_;
  const float *offset = bias_.defined() ? data(bias_) : nullptr, *more = residual ? data(*residual) : nullptr;
  float* to = mutable_data(out);
  for_each(maps, [=](int64_t row, int64_t c, Lanes value, int64_t count) {
    const int64_t at = row * outputs + c;
    if (offset) value += load(offset + c, count);
    if (more) value += load(more + at, count);
    store(to + at, value, count);
  });
  return out;
}

PointwiseNormGELU::PointwiseNormGELU(const Tensor& weight, at::IntArrayRef channels, const BatchNorm& norm,
                                     int64_t chunks)
    : norm_(norm), width_(weight.size(0) / chunks) {
  for (const auto& chunk : weight.split(width_)) chunks_.emplace_back(chunk, channels);
}

std::vector<Tensor> PointwiseNormGELU::run(at::TensorList maps) const {
  std::vector<Tensor> out;
  for (const auto i : irange(chunks_.size())) {
    out.push_back(empty_map(maps[0], width_));
    const float *scale = norm_.scale() + i * width_, *shift = norm_.shift() + i * width_;
    float* to = mutable_data(out.back());
    chunks_[i].for_each(maps, [=, width = width_](int64_t row, int64_t c, Lanes value, int64_t count) {
      store(to + row * width + c, gelu(value * load(scale + c, count) + load(shift + c, count)), count);
    });
  }
  return out;
}

namespace {

Tensor pointwise(at::TensorList any, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto maps = dense(any);
  return Pointwise(weight, channels_of(maps), bias).run(maps, residual ? channels_last(*residual) : residual);
}

// Gradients of the parts and of the weight.
std::tuple<std::vector<Tensor>, Tensor> pointwise_backward(const Tensor& any, at::TensorList maps, const Tensor& weight) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor grad = channels_last(any), rows = pixels(grad), grad_weight = at::empty_like(weight);
  const auto parts = dense(maps);
  const auto weights = columns(weight, channels_of(parts));
  auto grad_weights = columns(grad_weight, channels_of(parts));
  std::vector<Tensor> out;
  for (const auto i : irange(parts.size())) {
    out.push_back(empty_map(parts[i]));
    Tensor to = pixels(out.back());
    at::mm_out(to, rows, weights[i]);
    at::mm_out(grad_weights[i], rows.t(), pixels(parts[i]));
  }
  return {out, grad_weight};
}

Tensor pixel_sums(const Tensor& map) {
  return sum_rows(pixels(channels_last(map)));
}

// gelu(BN(pointwise(...))) in equal parts of the channels; also the map before BN, without the bias, and the norm, for the
// backward pass.
std::tuple<std::vector<Tensor>, Tensor, Tensor> pointwise_norm_gelu_forward(
    at::TensorList maps, const Tensor& weight, const OptionalTensor& bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& mean, const Tensor& variance, bool training, double momentum, double eps,
    int64_t chunks) {
  const Tensor x = pointwise(maps, weight, {}, {});
  const auto norm = batch_norm(x, bias, {norm_weight, norm_bias, mean, variance, training, momentum, eps});
  std::vector<Tensor> out;
  for (int64_t i = 0; i < chunks; ++i) out.push_back(empty_map(x, x.size(1) / chunks));
  norm_gelu(x, norm, out);
  return {out, x, norm.values};
}

// Only what comes out of it, at once where BN does not have to see the whole map first.
std::vector<Tensor> pointwise_norm_gelu(at::TensorList maps, const Tensor& weight, const OptionalTensor& bias,
                                        const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean,
                                        const Tensor& variance, bool training, double momentum, double eps,
                                        int64_t chunks) {
  if (training) {
    return std::get<0>(pointwise_norm_gelu_forward(maps, weight, bias, norm_weight, norm_bias, mean, variance, training,
                                                   momentum, eps, chunks));
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto parts = dense(maps);
  const BatchNorm norm = batch_norm({}, bias, {norm_weight, norm_bias, mean, variance, training, momentum, eps});
  return PointwiseNormGELU(weight, channels_of(parts), norm, chunks).run(parts);
}

// Gradients of the parts, of the weight, of the bias, of the norm's weight and of its bias.
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> pointwise_norm_gelu_backward(
    at::TensorList grads, at::TensorList maps, const Tensor& weight, const Tensor& x, const Tensor& values,
    bool training) {
  const BatchNorm norm{values, training};
  const auto outer = norm_gelu_backward(grads, x, norm);
  auto [parts, grad_weight] = pointwise_backward(outer.x, maps, weight);
  // In training BN takes the mean away, and with it the bias.
  const Tensor grad_bias = training ? at::zeros_like(outer.bias) : outer.bias * values[2];
  return {parts, grad_weight, grad_bias, outer.weight, outer.bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("pointwise(Tensor[] parts, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor");
  library.def("pointwise_backward(Tensor grad, Tensor[] parts, Tensor weight) -> (Tensor[], Tensor)");
  library.def("pixel_sums(Tensor map) -> Tensor");
  library.def("pointwise_norm_gelu(Tensor[] parts, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias,"
              " Tensor(a!) mean, Tensor(b!) variance, bool training, float momentum, float eps, int chunks) -> Tensor[]");
  library.def("pointwise_norm_gelu_forward(Tensor[] parts, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias,"
              " Tensor(a!) mean, Tensor(b!) variance, bool training, float momentum, float eps, int chunks)"
              " -> (Tensor[], Tensor, Tensor)");
  library.def("pointwise_norm_gelu_backward(Tensor[] grads, Tensor[] parts, Tensor weight, Tensor x, Tensor norm,"
              " bool training) -> (Tensor[], Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("pointwise", pointwise);
  library.impl("pointwise_backward", pointwise_backward);
  library.impl("pixel_sums", pixel_sums);
  library.impl("pointwise_norm_gelu_forward", pointwise_norm_gelu_forward);
  library.impl("pointwise_norm_gelu", pointwise_norm_gelu);
  library.impl("pointwise_norm_gelu_backward", pointwise_norm_gelu_backward);
}

}  // namespace mmstrip
