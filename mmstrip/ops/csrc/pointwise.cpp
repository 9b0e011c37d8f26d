// 1x1 convolutions of concatenated maps, one matrix product per map, and the layers after them.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "gelu.h"
#include "layers.h"

namespace mmstrip {

bool takes_bfloat16() {
#ifdef MMSTRIP_BFLOAT16
  static const bool takes = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    try {
      const std::vector<BFloat16> zeros(2 * LANES);
      Lanes sums;
      at::native::cpublas::brgemm(1, LANES, 2, 2, LANES, LANES, false, zeros.data(), zeros.data(),
                                  reinterpret_cast<float*>(&sums));
      at::native::cpublas::brgemm_release();
      return true;
    } catch (const c10::Error&) {  // oneDNN's settings disable it
      return false;
    }
  }();
  return takes;
#else
  return false;
#endif
}

namespace {

void check_parts(at::TensorList parts) {
  TORCH_CHECK(!parts.empty(), "parts must hold at least one map, but is empty");
  check_map(parts[0], "parts");
  for (const auto& part : parts) check_map(part, "parts", {parts[0].size(0), ANY, parts[0].size(2), parts[0].size(3)});
}

std::vector<Tensor> all_in_channels_last(at::TensorList maps) {
  std::vector<Tensor> out;
  for (const auto& map : maps) out.push_back(in_channels_last(map));
  return out;
}

std::vector<int64_t> channels_of(at::TensorList maps) {
  std::vector<int64_t> channels;
  for (const auto& map : maps) channels.push_back(map.size(1));
  return channels;
}

// Refuse weights that are not (O, sum of `channels`, 1, 1).
void check_weight(const Tensor& weight, at::IntArrayRef channels) {
  check(weight, "weight", {ANY, std::accumulate(channels.begin(), channels.end(), int64_t(0)), 1, 1});
  TORCH_CHECK(weight.size(0) > 0, "weight must have at least one output, but has shape ", weight.sizes());
}

// The columns of these weights for each part.
std::vector<Tensor> columns(const Tensor& weight, at::IntArrayRef channels) {
  return weight.flatten(1).split_with_sizes(channels, 1);
}

}  // namespace

Pointwise::Pointwise(const Tensor& weight, at::IntArrayRef channels, at::ScalarType type, const OptionalTensor& bias)
    : outputs_(weight.size(0)) {
  check_weight(weight, channels);
  bias_ = checked(bias, "bias", {outputs_}).value_or(Tensor());
  for (const auto& part : columns(weight, channels)) packed_.emplace_back(part, type);
}

Tensor Pointwise::run(at::TensorList maps, const OptionalTensor& residual, Tensor out) const {
  if (!out.defined()) out = empty_map(maps[0], outputs_);
  const int64_t outputs = outputs_;
  const float* bias = bias_.defined() ? data(bias_) : nullptr;
  with_type(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* addend = residual ? data<T>(*residual) : nullptr;
    T* to = mutable_data<T>(out);
    for_each<T>(maps, [=](int64_t row, int64_t c, Lanes value, int64_t count) {
      const int64_t at = row * outputs + c;
      if (bias) value += load(bias + c, count);
      if (addend) value += load(addend + at, count);
      store(to + at, value, count);
    });
  });
  return out;
}

PointwiseNormGELU::PointwiseNormGELU(const Tensor& weight, at::IntArrayRef channels, at::ScalarType type,
                                     const BatchNorm& norm, int64_t chunks)
    : norm_(norm), width_(weight.size(0) / chunks) {
  for (const auto& chunk : weight.split(width_)) chunks_.emplace_back(chunk, channels, type);
}

std::vector<Tensor> PointwiseNormGELU::run(at::TensorList maps) const {
  std::vector<Tensor> out;
  for (const auto i : irange(chunks_.size())) {
    out.push_back(empty_map(maps[0], width_));
    const float *scale = norm_.scale() + i * width_, *shift = norm_.shift() + i * width_;
    with_type(out.back().scalar_type(), [&](auto type) {
      using T = decltype(type);
      T* to = mutable_data<T>(out.back());
      chunks_[i].for_each<T>(maps, [=, width = width_](int64_t row, int64_t c, Lanes value, int64_t count) {
        store(to + row * width + c, gelu(value * load(scale + c, count) + load(shift + c, count)), count);
      });
    });
  }
  return out;
}

namespace {

Tensor pointwise(at::TensorList parts, const Tensor& weight, const OptionalTensor& bias) {
  const BelowAutograd guard;
  check_parts(parts);
  return Pointwise(weight, channels_of(parts), parts[0].scalar_type(), bias).run(all_in_channels_last(parts));
}

struct PointwiseGrad {
  std::vector<Tensor> parts;
  Tensor weight;
};

// Gradients of the parts and of the weight, from `grad` and `maps` in channels_last memory.
PointwiseGrad gradients(const Tensor& grad, at::TensorList maps, const Tensor& parameter, bool weight_required,
                        const std::vector<bool>& parts_required) {
  const auto channels = channels_of(maps);
  const Tensor weight = parameter.to(maps[0].scalar_type());
  const auto weights = columns(weight, channels);
  PointwiseGrad out;
  if (weight_required) out.weight = at::empty(weight.sizes(), weight.options());
  const auto rows = grad.defined() ? pixels(grad) : Tensor();
  auto grad_weights = weight_required ? columns(out.weight, channels) : std::vector<Tensor>();
  for (const auto i : irange(maps.size())) {
    out.parts.push_back(parts_required[i] ? empty_map(maps[i]) : no_gradient(maps[i]));
    if (parts_required[i]) {
      Tensor to = pixels(out.parts.back());
      at::mm_out(to, rows, weights[i]);
    }
    if (weight_required) at::mm_out(grad_weights[i], rows.t(), pixels(maps[i]));
  }
  return out;
}

// Which gradients are required: of `count` arguments, then of the parts.
struct Required {
  std::vector<bool> arguments, parts;

  Required(const c10::List<bool>& required, size_t count, size_t part_count) {
    TORCH_CHECK(required.size() == count + part_count, "required must have length ", count + part_count,
                ", but has length ", required.size());
    for (const auto i : irange(required.size())) (i < count ? arguments : parts).push_back(required[i]);
  }

  bool operator[](size_t argument) const { return arguments[argument]; }

  // Whether more than the sums of the gradient of the convolution's output is needed.
  bool map() const { return arguments[0] || std::find(parts.begin(), parts.end(), true) != parts.end(); }
};

// Gradients of the parts, of the weight and of the bias.
std::tuple<std::vector<Tensor>, Tensor, Tensor> pointwise_backward(const Tensor& grad_out, at::TensorList parts,
                                                                   const Tensor& weight, const c10::List<bool>& mask) {
  const BelowAutograd guard;
  check_parts(parts);
  check_weight(weight, channels_of(parts));
  const Required required(mask, 2, parts.size());
  check_map(grad_out, "grad", {parts[0].size(0), weight.size(0), parts[0].size(2), parts[0].size(3)});
  const auto maps = all_in_channels_last(parts);
  const Tensor grad = in_channels_last(grad_out);
  auto out = gradients(grad, maps, weight, required[0], required.parts);
  return {std::move(out.parts), out.weight, required[1] ? sum_rows(pixels(grad)) : Tensor()};
}

// Refuse unequal chunks.
void check_chunks(int64_t chunks, int64_t channels) {
  TORCH_CHECK(chunks > 0 && channels % chunks == 0, "chunks must divide the ", channels, " outputs, but is ", chunks);
}

// gelu(BN(pointwise(...))) in equal chunks of the channels; also the map before BN, without the bias, and the norm, for
// backward.
std::tuple<std::vector<Tensor>, Tensor, Tensor> pointwise_norm_gelu_forward(
    at::TensorList parts, const Tensor& weight, const OptionalTensor& bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& mean, const Tensor& variance, bool training, double momentum, double eps,
    int64_t chunks) {
  const BelowAutograd guard;
  check_parts(parts);
  check_weight(weight, channels_of(parts));
  const int64_t channels = weight.size(0);
  check_chunks(chunks, channels);
  const BatchNormLayer layer{norm_weight, norm_bias, mean, variance, training, momentum, eps};
  layer.check(channels);
  if (bias) check(*bias, "bias", {channels});
  const Tensor x = pointwise(parts, weight, {});
  const auto norm = batch_norm(layer, channels, x, bias);
  std::vector<Tensor> out;
  for (int64_t i = 0; i < chunks; ++i) out.push_back(empty_map(x, channels / chunks));
  norm_gelu(x, norm, out);
  return {out, x, norm.values};
}

// Only the output; in one pass if BN does not need statistics of the map.
std::vector<Tensor> pointwise_norm_gelu(at::TensorList parts, const Tensor& weight, const OptionalTensor& bias,
                                        const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean,
                                        const Tensor& variance, bool training, double momentum, double eps,
                                        int64_t chunks) {
  if (training) {
    return std::get<0>(pointwise_norm_gelu_forward(parts, weight, bias, norm_weight, norm_bias, mean, variance,
                                                   training, momentum, eps, chunks));
  }
  const BelowAutograd guard;
  check_parts(parts);
  check_weight(weight, channels_of(parts));
  check_chunks(chunks, weight.size(0));
  const auto norm =
      batch_norm({norm_weight, norm_bias, mean, variance, training, momentum, eps}, weight.size(0), {}, bias);
  return PointwiseNormGELU(weight, channels_of(parts), parts[0].scalar_type(), norm, chunks)
      .run(all_in_channels_last(parts));
}

// Gradients of the parts, of the weight, of the bias, of the norm's weight and of its bias.
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> pointwise_norm_gelu_backward(
    at::TensorList grads, at::TensorList parts, const Tensor& weight, const Tensor& input, const Tensor& values,
    bool training, const c10::List<bool>& mask) {
  const BelowAutograd guard;
  check_parts(parts);
  check_weight(weight, channels_of(parts));
  const Required required(mask, 4, parts.size());
  const int64_t images = parts[0].size(0), channels = weight.size(0), height = parts[0].size(2),
                width = parts[0].size(3);
  check_map(input, "x", {images, channels, height, width});
  const auto norm = BatchNorm::saved(values, channels, training);
  const int64_t chunks = grads.size();
  TORCH_CHECK(chunks > 0 && channels % chunks == 0, "grads must be equal chunks of ", channels,
              " outputs, but there are ", chunks);
  for (const auto& grad : grads) check_map(grad, "grads", {images, channels / chunks, height, width});
  const auto maps = all_in_channels_last(parts), chunk_grads = all_in_channels_last(grads);
  const Tensor x = in_channels_last(input);
  BatchNormGrad outer;
  if (required.map() || (required[1] && !training) || required[2] || required[3]) {
    outer = norm_gelu_backward(chunk_grads, x, norm, required.map());
  }
  auto inner = gradients(outer.x, maps, weight, required[0], required.parts);
  // In training, BN subtracts the mean and with it the bias.
  Tensor grad_bias;
  if (required[1]) grad_bias = training ? at::zeros({channels}, at::kFloat) : outer.bias.mul(norm.values[2]);
  return {std::move(inner.parts), inner.weight, grad_bias, required[2] ? outer.weight : Tensor(),
          required[3] ? outer.bias : Tensor()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("takes_bfloat16() -> bool", takes_bfloat16);
  library.def("pointwise(Tensor[] parts, Tensor weight, Tensor? bias=None) -> Tensor");
  library.def(
      "pointwise_backward(Tensor grad, Tensor[] parts, Tensor weight, bool[] required)"
      " -> (Tensor[], Tensor, Tensor)");
  library.def(
      "pointwise_norm_gelu(Tensor[] parts, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias,"
      " Tensor(a!) mean, Tensor(b!) variance, bool training, float momentum, float eps, int chunks) -> Tensor[]");
  library.def(
      "pointwise_norm_gelu_forward(Tensor[] parts, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias,"
      " Tensor(a!) mean, Tensor(b!) variance, bool training, float momentum, float eps, int chunks)"
      " -> (Tensor[], Tensor, Tensor)");
  library.def(
      "pointwise_norm_gelu_backward(Tensor[] grads, Tensor[] parts, Tensor weight, Tensor x, Tensor norm,"
      " bool training, bool[] required) -> (Tensor[], Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("pointwise", pointwise);
  library.impl("pointwise_backward", pointwise_backward);
  library.impl("pointwise_norm_gelu_forward", pointwise_norm_gelu_forward);
  library.impl("pointwise_norm_gelu", pointwise_norm_gelu);
  library.impl("pointwise_norm_gelu_backward", pointwise_norm_gelu_backward);
}

}  // namespace mmstrip
