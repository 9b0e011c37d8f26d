// Channel mixing: LayerNorm, linear layer, GELU, GRN and linear layer.
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>

#include "gelu.h"
#include "layers.h"

namespace mmstrip {
namespace {

constexpr float SMALLEST_NORM = 1e-12f;  // of a channel in GRN

// Refuse weights of the linear layers that are not (E, C) and (O, E).
void check_weights(const Tensor& expand, const Tensor& reduce, int64_t channels) {
  check(expand, "expand", {ANY, channels});
  check(reduce, "reduce", {ANY, expand.size(0)});
  TORCH_CHECK(expand.numel() > 0 && reduce.numel() > 0, "expand and reduce must not be empty, but have shapes ",
              expand.sizes(), " and ", reduce.sizes());
}

// The bias of the second linear layer plus its weight times beta.
Tensor shifted_bias(const Tensor& bias, const Tensor& weight, const OptionalTensor& beta) {
  const Tensor dense = checked(bias, "reduce_bias", {weight.size(0)});
  return beta ? at::addmv(dense, weight.to(at::kFloat), checked(*beta, "beta", {weight.size(1)})) : dense;
}

Slices slices_of(const Tensor& x, int64_t images) { return Slices(images, x.size(0) / images, x.size(1)); }

// (N, slices, C) to (N, C)
Tensor sum_slices(const Tensor& sums) {
  const int64_t per_image = sums.size(1), channels = sums.size(2);
  const Tensor out = at::zeros({sums.size(0), channels}, sums.options());
  for (const auto slice : irange(sums.size(0) * per_image)) {
    float* to = mutable_data(out) + slice / per_image * channels;
    const float* from = data(sums) + slice * channels;
    for (const auto c : irange(channels)) to[c] += from[c];
  }
  return out;
}

// y = gelu(x + shift) of rows (R, C) of T, and the sums of squares of y per image, (N, C).
template <typename T>
Tensor gelu_square_sum(const Tensor& x, const Tensor& shift, const Tensor& y, int64_t images) {
  const Slices slices = slices_of(x, images);
  const Tensor sums = slices.sums();
  const int64_t channels = slices.channels;
  const float* b = data(shift);
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    const T* from = data<T>(x) + first * channels;
    T* to = mutable_data<T>(y) + first * channels;
    for (int64_t row = first; row < end; ++row, from += channels, to += channels) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes value = gelu(load(from + c, lanes) + load(b + c, lanes));
        store(to + c, value, lanes);
        add_to(sum + c, value * value, lanes);
      });
    }
  });
  return sum_slices(sums);
}

// GRN's norm from sums of squares.
Tensor response_norm(const Tensor& squares) {
  return squares.clamp_min(double(SMALLEST_NORM) * SMALLEST_NORM).sqrt_();  // sqrt has no gradient at 0
}

// GRN's factor 1 + gamma g / (mean of g + eps) from norms g (N, C).
Tensor response_factor(const Tensor& norm, const Tensor& gamma, double eps) {
  const Tensor factor = at::empty_like(norm);
  const int64_t channels = norm.size(1);
  const float* scale = data(gamma);
  for (const auto image : irange(norm.size(0))) {
    const float* g = data(norm) + image * channels;
    float* to = mutable_data(factor) + image * channels;
    const float mean = std::accumulate(g, g + channels, 0.0) / channels + eps;
    for (const auto c : irange(channels)) to[c] = 1 + scale[c] * (g[c] / mean);
  }
  return factor;
}

// Multiply a row of C channels by a factor per channel, in place.
template <typename T>
void scale_row(T* row, const float* factor, int64_t channels) {
  for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    store(row + c, load(row + c, lanes) * load(factor + c, lanes), lanes);
  });
}

// Multiply rows (R, C) of T by the factor (N, C) of their image, in place.
template <typename T>
void scale_rows(const Tensor& x, const Tensor& factor) {
  const Slices slices = slices_of(x, factor.size(0));
  const int64_t channels = slices.channels;
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    const float* times = data(factor) + slice / slices.per_image * channels;
    T* rows = mutable_data<T>(x);
    for (const auto row : irange(first, end)) scale_row(rows + row * channels, times, channels);
  });
}

// LayerNorm of rows of C channels; `row` is scratch memory for one row.
template <typename T>
void layer_norm(const T* from, int64_t rows, int64_t channels, const LayerNorm& norm, float* row, T* to) {
  const float* weight = norm.weight ? data(*norm.weight) : nullptr;
  const float* bias = norm.bias ? data(*norm.bias) : nullptr;
  for (int64_t i = 0; i < rows; ++i, from += channels, to += channels) {
    Lanes sum{}, square{};
    for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) { sum += load(from + c, lanes); });
    const float mean = sum_of(sum) / channels;
    for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      store(row + c, load(from + c, lanes) - mean, lanes);
      const Lanes distance = load(row + c, lanes);  // 0 after the last channel
      square += distance * distance;
    });
    const float variance = sum_of(square) / channels;  // 1 / variance would hide an overflow
    const float inverse = std::isfinite(variance) ? 1.0f / std::sqrt(variance + float(norm.eps)) : NAN;
    for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      Lanes value = load(row + c, lanes) * inverse;
      if (weight) value *= load(weight + c, lanes);
      if (bias) value += load(bias + c, lanes);
      store(to + c, value, lanes);
    });
  }
}

}  // namespace

ChannelMLP::ChannelMLP(at::ScalarType type, const LayerNorm& norm, const Tensor& expand, const Tensor& expand_bias,
                       const Tensor& gamma, const OptionalTensor& beta, double eps, const Tensor& reduce,
                       const Tensor& reduce_bias)
    : norm_{checked(norm.weight, "norm_weight", {expand.size(1)}), checked(norm.bias, "norm_bias", {expand.size(1)}),
            norm.eps},
      expand_(expand, type),
      reduce_(reduce, type),
      expand_bias_(checked(expand_bias, "expand_bias", {expand.size(0)})),
      gamma_(checked(gamma, "gamma", {expand.size(0)})),
      bias_(shifted_bias(reduce_bias, reduce, beta)),
      eps_(eps) {}

// One forward pass on a map of T, one image or group of images at a time.
template <typename T>
class ChannelMLP::Run {
 public:
  Run(const ChannelMLP& mlp, const Tensor& x, const OptionalTensor& residual, const Tensor& out)
      : mlp_(mlp),
        pixels_(x.size(2) * x.size(3)),
        channels_(x.size(1)),
        hidden_(mlp.expand_.outputs),
        outputs_(mlp.reduce_.outputs),
        groups_(x.size(0), pixels_),
        scale_weights_(groups_.size == 1 && pixels_ > outputs_),
        x_(data<T>(x)),
        residual_(residual ? data<T>(*residual) : nullptr),
        out_(mutable_data<T>(out)),
        memory_(groups_.memory(groups_.size * pixels_ * hidden_, x.scalar_type())),
        scaled_(groups_.memory(scale_weights_ ? mlp.reduce_.vectors() * LANES : 0, at::kFloat)) {}

  void run() const {
    groups_.for_each([&](int64_t image, int64_t images, int64_t thread) {
      const BelowAutograd guard;  // threads do not inherit the guard
      T* rows = mutable_data<T>(memory_) + thread * memory_.size(1);
      std::vector<int64_t> place;  // of each row, the start of its image's values
      for (const auto i : irange(images)) place.insert(place.end(), pixels_, i * hidden_);
      const Tensor factor = expand(image, images, place, rows);
      reduce(image, place, rows, data(factor), mutable_data(scaled_) + thread * scaled_.size(1));
    });
  }

 private:
  // Run images up to GELU, into `rows`; returns GRN's factor (images, E).
  Tensor expand(int64_t image, int64_t images, const std::vector<int64_t>& place, T* rows) const {
    const RowBlocks blocks(place.size(), hidden_);
    const int64_t spanned = std::min(images, (blocks.size - 2 + pixels_) / pixels_ + 1);  // most images in a block
    const Tensor squares = at::zeros({blocks.count, spanned, hidden_}, at::kFloat);
    float* sums = mutable_data(squares);
    const T* from = x_ + image * pixels_ * channels_;
    const float* bias = data(mlp_.expand_bias_);
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end, int64_t part) {
      const int64_t size = (end - begin) * channels_ * sizeof(T) / sizeof(Lanes) + 1,
                    row_size = divide_up(channels_, LANES);
      Workspace workspace(size + row_size);
      T* normed = reinterpret_cast<T*>(workspace.take(size));
      layer_norm(from + begin * channels_, end - begin, channels_, mlp_.norm_,
                 reinterpret_cast<float*>(workspace.take(row_size)), normed);
      const int64_t first = block * spanned * hidden_ - place[begin];
      const Operand<T> operand{normed, channels_, mlp_.expand_.template packed<T>(), channels_};
      multiply_rows(at::ArrayRef<Operand<T>>(operand), 0, end - begin, hidden_, part, blocks.parts,
                    [&](int64_t row, int64_t c, Lanes value, int64_t count) {
                      const Lanes y = gelu(value + load(bias + c, count));
                      store(rows + (begin + row) * hidden_ + c, y, count);
                      add_to(sums + (first + place[begin + row] + c), y * y, count);
                    });
    });
    const Tensor all = at::zeros({images, hidden_}, at::kFloat);
    for (const auto block : irange(blocks.count)) {
      const int64_t begin = block * blocks.size, end = std::min(begin + blocks.size, blocks.rows);
      const float* sum = sums + block * spanned * hidden_;
      float* to = mutable_data(all) + place[begin];
      for (int64_t i = 0; i < place[end - 1] - place[begin] + hidden_; ++i) to[i] += sum[i];
    }
    return response_factor(response_norm(all), mlp_.gamma_, mlp_.eps_);
  }

  // The rest. GRN's factor is applied to the weights, in `scaled`, if these are fewer than the pixels.
  void reduce(int64_t image, const std::vector<int64_t>& place, T* rows, const float* factor, float* scaled) const {
    const Packed<T>* weights = mlp_.reduce_.template packed<T>();
    const float* bias = data(mlp_.bias_);
    if (scale_weights_) {
      mlp_.reduce_.scale(factor, reinterpret_cast<Packed<T>*>(scaled));
      weights = reinterpret_cast<const Packed<T>*>(scaled);
    }
    const Operand<T> operand{rows, hidden_, weights, hidden_};
    const RowBlocks blocks(place.size(), outputs_);
    const auto scale = [&](int64_t begin, int64_t end) {
      for (const auto row : irange(begin, end)) scale_row(rows + row * hidden_, factor + place[row], hidden_);
    };
    const bool scale_first = !scale_weights_ && blocks.parts > 1;
    if (scale_first) at::parallel_for(0, blocks.rows, 1, scale);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end, int64_t part) {
      if (!scale_weights_ && !scale_first) scale(begin, end);
      multiply_rows(at::ArrayRef<Operand<T>>(operand), begin, end, outputs_, part, blocks.parts,
                    [&](int64_t row, int64_t c, Lanes value, int64_t count) {
                      const int64_t at = (image * pixels_ + row) * outputs_ + c;
                      value += load(bias + c, count);
                      if (residual_) value += load(residual_ + at, count);
                      store(out_ + at, value, count);
                    });
    });
  }

  const ChannelMLP& mlp_;
  const int64_t pixels_, channels_, hidden_, outputs_;
  const Groups groups_;
  const bool scale_weights_;
  const T *x_, *residual_;
  T* const out_;
  const Tensor memory_, scaled_;
};

Tensor ChannelMLP::run(const Tensor& x, const OptionalTensor& residual, Tensor out) const {
  if (!out.defined()) out = empty_map(x, reduce_.outputs);
  with_type(x.scalar_type(), [&](auto type) { Run<decltype(type)>(*this, x, residual, out).run(); });
  return out;
}

namespace {

// With float32 weights, PyTorch's LayerNorm computes its statistics in float32 too.
Tensor weight_or_ones(const OptionalTensor& weight, int64_t channels) {
  return weight ? *weight : at::ones({channels}, at::kFloat);
}

Tensor channel_mlp(const Tensor& input, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                   double norm_eps, const Tensor& expand, const Tensor& expand_bias, const Tensor& gamma,
                   const OptionalTensor& beta, double eps, const Tensor& reduce, const Tensor& reduce_bias) {
  const BelowAutograd guard;
  check_map(input, "x");
  check_weights(expand, reduce, input.size(1));
  const ChannelMLP mlp(input.scalar_type(), {norm_weight, norm_bias, norm_eps}, expand, expand_bias, gamma, beta, eps,
                       reduce, reduce_bias);
  return mlp.run(in_channels_last(input));
}

// Also returns what backward needs: the rows after LayerNorm, its mean and inverse deviation, the hidden rows before
// GELU without their bias, and GRN's norm.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_mlp_forward(
    const Tensor& input, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
    const Tensor& expand, const Tensor& bias, const Tensor& grn_gamma, const OptionalTensor& beta, double eps,
    const Tensor& reduce, const Tensor& reduce_bias) {
  const BelowAutograd guard;
  check_map(input, "x");
  const int64_t channels = input.size(1);
  check_weights(expand, reduce, channels);
  const auto weight = checked(norm_weight, "norm_weight", {channels}),
             offset = checked(norm_bias, "norm_bias", {channels});
  const Tensor expand_bias = checked(bias, "expand_bias", {expand.size(0)});
  const Tensor gamma = checked(grn_gamma, "gamma", {expand.size(0)});
  const Tensor shifted = shifted_bias(reduce_bias, reduce, beta);
  const Tensor x = in_channels_last(input), out = empty_map(x, reduce.size(0));
  const auto [rows, mean, inverse] =
      at::native_layer_norm(pixels(x), {channels}, weight_or_ones(weight, channels), offset, norm_eps);
  const Tensor hidden = rows.mm(expand.to(x.scalar_type()).t()), y = at::empty_like(hidden);
  const Tensor norm = with_type(x.scalar_type(), [&, hidden = hidden](auto type) {
    using T = decltype(type);
    const Tensor norm = response_norm(gelu_square_sum<T>(hidden, expand_bias, y, x.size(0)));
    scale_rows<T>(y, response_factor(norm, gamma, eps));
    return norm;
  });
  Tensor to = pixels(out);
  at::addmm_out(to, shifted.to(x.scalar_type()), y, reduce.to(x.scalar_type()).t());
  return {out, rows, mean, inverse, hidden, norm};
}

// For y = gelu(x + shift), all of T: y * factor (N, C) if `scaled`, and the sums of y * grad (N, C) if grad is given.
template <typename T>
std::tuple<Tensor, Tensor> gelu_scale(const Tensor& x, const Tensor& shift, const Tensor& factor, const Tensor& grad,
                                      bool scaled) {
  const Slices slices = slices_of(x, factor.size(0));
  const Tensor out = scaled ? at::empty_like(x) : Tensor();
  const Tensor sums = grad.defined() ? slices.sums() : Tensor();
  const int64_t channels = slices.channels;
  const float* b = data(shift);
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    const float* times = data(factor) + slice / slices.per_image * channels;
    const T* from = data<T>(x);
    const T* grad_out = grad.defined() ? data<T>(grad) : nullptr;
    T* to = scaled ? mutable_data<T>(out) : nullptr;
    float* sum = grad.defined() ? mutable_data(sums) + slice * channels : nullptr;
    for (int64_t row = first; row < end; ++row) {
      const int64_t offset = row * channels;
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes y = gelu(load(from + offset + c, lanes) + load(b + c, lanes));
        if (to) store(to + offset + c, y * load(times + c, lanes), lanes);
        if (sum) add_to(sum + c, y * load(grad_out + offset + c, lanes), lanes);
      });
    }
  });
  return {out, grad.defined() ? sum_slices(sums) : Tensor()};
}

// Gradient of x, in place of grad: (grad * factor + y * y_slope) * gelu'(x + shift), and its sums (C, ).
template <typename T>
Tensor gelu_scale_backward(const Tensor& grad, const Tensor& x, const Tensor& shift, const Tensor& factor,
                           const Tensor& y_slope) {
  const Slices slices = slices_of(x, factor.size(0));
  const Tensor sums = slices.sums();
  const int64_t channels = slices.channels;
  const float* b = data(shift);
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    const float* times = data(factor) + slice / slices.per_image * channels;
    const float* slope = data(y_slope) + slice / slices.per_image * channels;
    const T* from = data<T>(x) + first * channels;
    T* to = mutable_data<T>(grad) + first * channels;
    for (int64_t row = first; row < end; ++row, from += channels, to += channels) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes value = load(from + c, lanes) + load(b + c, lanes);
        const Lanes grad_out = load(to + c, lanes) * load(times + c, lanes) + gelu(value) * load(slope + c, lanes);
        const Lanes out = grad_out * gelu_slope(value);
        store(to + c, out, lanes);
        add_to(sum + c, out, lanes);
      });
    }
  });
  return sum_rows(sums.flatten(0, 1));
}

// Backward of GRN's factor, from the sums (N, C) of its gradient times y over the map: the gradient of gamma (C, ), and
// the factor (N, C) of y in the gradient of y.
std::tuple<Tensor, Tensor> response_backward(const Tensor& product, const Tensor& norm, const Tensor& gamma,
                                             double eps) {
  const int64_t channels = norm.size(1);
  const Tensor grad_gamma = at::zeros({channels}, norm.options()), slope = at::empty_like(norm);
  const float* scale = data(gamma);
  float* to_gamma = mutable_data(grad_gamma);
  for (const auto image : irange(norm.size(0))) {
    const float* g = data(norm) + image * channels;
    const float* sum = data(product) + image * channels;
    float* to = mutable_data(slope) + image * channels;
    const float mean = std::accumulate(g, g + channels, 0.0) / channels + eps;
    double shared = 0;  // through the mean of the norms
    for (const auto c : irange(channels)) {
      to_gamma[c] += sum[c] * g[c] / mean;
      shared += sum[c] * scale[c] * g[c] / mean;
    }
    for (const auto c : irange(channels)) {
      const bool clamped = g[c] < 1.001f * SMALLEST_NORM;  // the norm is constant there
      to[c] = clamped ? 0.0f : (sum[c] * scale[c] - float(shared / channels)) / mean / g[c];
    }
  }
  return {grad_gamma, slope};
}

// Gradients of the map, LayerNorm's weight and bias, expand and its bias, gamma, beta, reduce and its bias.
std::vector<Tensor> channel_mlp_backward(const Tensor& grad_out, const Tensor& input, const OptionalTensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& expand_weight,
                                         const Tensor& bias, const Tensor& grn_gamma, const OptionalTensor& grn_beta,
                                         double eps, const Tensor& reduce_weight, const Tensor& saved_rows,
                                         const Tensor& saved_mean, const Tensor& saved_inverse,
                                         const Tensor& saved_hidden, const Tensor& saved_norm,
                                         std::array<bool, 9> required) {
  const BelowAutograd guard;
  check_map(input, "x");
  const int64_t images = input.size(0), channels = input.size(1), count = input.numel() / channels;
  check_weights(expand_weight, reduce_weight, channels);
  const int64_t width = expand_weight.size(0);
  check_map(grad_out, "grad", {images, reduce_weight.size(0), input.size(2), input.size(3)});
  const auto weight = checked(norm_weight, "norm_weight", {channels}),
             offset = checked(norm_bias, "norm_bias", {channels});
  const Tensor expand_bias = checked(bias, "expand_bias", {width}), gamma = checked(grn_gamma, "gamma", {width});
  const OptionalTensor beta = checked(grn_beta, "beta", {width});
  const Tensor rows = checked_rows(saved_rows, "rows", {count, channels});
  const Tensor hidden = checked_rows(saved_hidden, "hidden", {count, width});
  const Tensor norm = checked(saved_norm, "norm", {images, width});
  const Tensor mean = checked(saved_mean, "mean", {count, 1}), inverse = checked(saved_inverse, "inverse", {count, 1});
  const Tensor expand = expand_weight.to(input.scalar_type()), reduce = reduce_weight.to(input.scalar_type());
  const Tensor x = in_channels_last(input), grad = pixels(in_channels_last(grad_out));

  const auto [x_required, norm_weight_required, norm_bias_required, expand_required, expand_bias_required,
              gamma_required, beta_required, reduce_required, reduce_bias_required] = required;
  const bool rows_required = x_required || (weight && norm_weight_required) || (offset && norm_bias_required);
  const bool hidden_required = rows_required || expand_required || expand_bias_required;
  std::vector<Tensor> out(required.size(), no_gradient(x));
  auto &grad_x = out[0], &grad_expand = out[3], &grad_expand_bias = out[4], &grad_gamma = out[5], &grad_beta = out[6];
  auto &grad_reduce = out[7], &grad_reduce_bias = out[8];

  const Tensor factor = response_factor(norm, gamma, eps);
  const Tensor grad_hidden = hidden_required || gamma_required ? grad.mm(reduce) : Tensor();
  Tensor y, product;
  if (grad_hidden.defined() || reduce_required) {
    std::tie(y, product) = with_type(x.scalar_type(), [&](auto type) {
      return gelu_scale<decltype(type)>(hidden, expand_bias, factor, grad_hidden, reduce_required);
    });
  }
  if (reduce_bias_required || (beta && (beta_required || reduce_required))) {
    const Tensor sums = sum_rows(grad);
    if (reduce_required && beta) grad_reduce = grad.t().mm(y).to(at::kFloat).addr_(sums, *beta);
    if (beta_required && beta) grad_beta = reduce_weight.to(at::kFloat).t().mv(sums);
    if (reduce_bias_required) grad_reduce_bias = sums;
  }
  if (reduce_required && !beta) grad_reduce = grad.t().mm(y);
  if (!grad_hidden.defined()) return out;
  const auto [gamma_sums, y_slope] = response_backward(product, norm, gamma, eps);
  if (gamma_required) grad_gamma = gamma_sums;
  if (!hidden_required) return out;
  const Tensor sums = with_type(x.scalar_type(), [&, y_slope = y_slope](auto type) {
    return gelu_scale_backward<decltype(type)>(grad_hidden, hidden, expand_bias, factor, y_slope);
  });
  if (expand_bias_required) grad_expand_bias = sums;
  if (expand_required) grad_expand = grad_hidden.t().mm(rows);
  if (!rows_required) return out;
  auto [grad_rows, grad_norm_weight, grad_norm_bias] = at::native_layer_norm_backward(
      grad_hidden.mm(expand), pixels(x), {channels}, mean, inverse, weight_or_ones(weight, channels), offset,
      {x_required, weight && norm_weight_required, offset && norm_bias_required});
  if (x_required) grad_x = grad_rows.view({images, x.size(2), x.size(3), channels}).permute({0, 3, 1, 2});
  if (grad_norm_weight.defined()) out[1] = grad_norm_weight;
  if (grad_norm_bias.defined()) out[2] = grad_norm_bias;
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def(
      "channel_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor expand,"
      " Tensor expand_bias, Tensor gamma, Tensor? beta, float eps, Tensor reduce, Tensor reduce_bias) -> Tensor");
  library.def(
      "channel_mlp_forward(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor expand,"
      " Tensor expand_bias, Tensor gamma, Tensor? beta, float eps, Tensor reduce, Tensor reduce_bias)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "channel_mlp_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor expand,"
      " Tensor expand_bias, Tensor gamma, Tensor? beta, float eps, Tensor reduce, Tensor rows, Tensor mean,"
      " Tensor inverse, Tensor hidden, Tensor norm, bool[9] required) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("channel_mlp", channel_mlp);
  library.impl("channel_mlp_forward", channel_mlp_forward);
  library.impl("channel_mlp_backward", channel_mlp_backward);
}

}  // namespace mmstrip
