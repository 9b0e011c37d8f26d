// 1x1 convolutions of concatenated maps, as one matrix product a map, and what follows them.
#include <torch/library.h>

#include <deque>

#include "gelu.h"
#include "maps.h"
#include "matmul.h"

namespace mmstrip {
namespace {

std::vector<Tensor> dense(at::TensorList maps) {
  std::vector<Tensor> out;
  for (const auto& map : maps) out.push_back(channels_last(map));
  return out;
}

// The columns of a weight (O, sum of C_i, 1, 1) that belong to each part.
std::vector<Tensor> columns(const Tensor& weight, at::TensorList parts) {
  std::vector<int64_t> sizes;
  int64_t channels = 0;
  for (const auto& part : parts) {
    TORCH_CHECK(part.numel() / part.size(1) == parts[0].numel() / parts[0].size(1), "maps of different sizes");
    sizes.push_back(part.size(1));
    channels += part.size(1);
  }
  TORCH_CHECK(weight.numel() == weight.size(0) * channels, "a weight ", weight.sizes(), " does not fit maps of ", channels,
              " channels");
  return weight.view({weight.size(0), channels}).split_with_sizes(sizes, 1);
}

// Maps and their columns of a weight (O, sum of C_i), ready to be multiplied.
class Product {
 public:
  Product(at::TensorList maps, const Tensor& weight) : maps_(dense(maps)), outputs_(weight.size(0)) {
    const auto weights = columns(weight, maps_);
    for (const auto i : c10::irange(maps_.size())) {
      const int64_t channels = maps_[i].size(1);
      packed_.emplace_back(weights[i]);
      operands_.push_back({data(maps_[i]), channels, packed_.back().block(0), channels});
    }
  }

  // As multiply_rows, for all pixels, in parallel.
  template <typename Finish>
  void for_each(Finish finish) const {
    const RowBlocks blocks(maps_[0].numel() / maps_[0].size(1), outputs_);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end, int64_t part) {
      multiply_rows(operands_, begin, end, outputs_, part, blocks.parts, finish);
    });
  }

 private:
  std::vector<Tensor> maps_;
  int64_t outputs_;
  std::deque<Packed> packed_;
  std::vector<Operand> operands_;
};

// Plus a residual (N, O, H, W), if there is one.
Tensor pointwise(at::TensorList maps, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t outputs = weight.size(0);
  const Tensor out = empty_map(maps[0], outputs), added = residual ? channels_last(*residual) : Tensor();
  const float *offset = bias ? data(*bias) : nullptr, *more = residual ? data(added) : nullptr;
  float* to = mutable_data(out);
  TORCH_CHECK(!residual || residual->sizes() == out.sizes(), "a residual ", residual ? residual->sizes() : out.sizes(),
              " does not fit a map ", out.sizes());
  Product(maps, weight).for_each([&](int64_t row, int64_t c, Lanes value, int64_t count) {
    const int64_t at = row * outputs + c;
    if (offset) value += load(offset + c, count);
    if (more) value += load(more + at, count);
    store(to + at, value, count);
  });
  return out;
}

// Gradients of the parts and of the weight.
std::tuple<std::vector<Tensor>, Tensor> pointwise_backward(const Tensor& any, at::TensorList maps, const Tensor& weight) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor grad = channels_last(any), rows = pixels(grad), grad_weight = at::empty_like(weight);
  const auto parts = dense(maps);
  const auto weights = columns(weight, parts);
  auto grad_weights = columns(grad_weight, parts);
  std::vector<Tensor> out;
  for (const auto i : c10::irange(parts.size())) {
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
  const int64_t width = weight.size(0) / chunks;
  const BatchNorm norm = batch_norm({}, bias, {norm_weight, norm_bias, mean, variance, training, momentum, eps});
  std::vector<Tensor> out;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    out.push_back(empty_map(maps[0], width));
    const float *scale = norm.scale() + chunk * width, *shift = norm.shift() + chunk * width;
    float* to = mutable_data(out.back());
    Product(maps, weight.narrow(0, chunk * width, width)).for_each([&](int64_t row, int64_t c, Lanes value, int64_t count) {
      store(to + row * width + c, gelu(value * load(scale + c, count) + load(shift + c, count)), count);
    });
  }
  return out;
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
