// LayerNorm, linear layer, GELU, GRN and linear layer of the channel mixing.
#include <torch/library.h>

#include <numeric>

#include "gelu.h"
#include "maps.h"
#include "steps.h"

namespace mmstrip {
namespace {

Tensor shifted_bias(const Tensor& bias, const Tensor& weight, const OptionalTensor& beta) {
  return beta ? at::addmv(bias, weight, *beta) : bias;
}

Slices slices_of(const Tensor& x, int64_t images) {
  return Slices(images, x.size(0) / images, x.size(1));
}

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

// y = gelu(x + shift) of rows (R, C), and the sums of its squares for each image, (N, C).
Tensor gelu_square_sum(const Tensor& x, const Tensor& shift, const Tensor& y, int64_t images) {
  const Slices slices = slices_of(x, images);
  const Tensor sums = slices.sums(x.options());
  const int64_t channels = slices.channels;
  const float* b = data(shift);
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    const float* from = data(x) + first * channels;
    float* to = mutable_data(y) + first * channels;
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

// GRN's norm of sums of squares.
Tensor response_norm(const Tensor& squares) {
  return squares.clamp_min(1e-24).sqrt_();  // it has no gradient at 0
}

// GRN's factor 1 + gamma g / (mean of g + eps) of the norms g (N, C).
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

// A row of C channels times a factor each, in place.
void scale_row(float* row, const float* factor, int64_t channels) {
  for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    store(row + c, load(row + c, lanes) * load(factor + c, lanes), lanes);
  });
}

// Rows (R, C) times the factor (N, C) of their image, in place.
void scale_rows(const Tensor& x, const Tensor& factor) {
  const Slices slices = slices_of(x, factor.size(0));
  const int64_t channels = slices.channels;
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    const float* times = data(factor) + slice / slices.per_image * channels;
    float* rows = mutable_data(x);
    for (const auto row : irange(first, end)) scale_row(rows + row * channels, times, channels);
  });
}

// Rows of C channels through LayerNorm.
void layer_norm(const float* from, int64_t rows, int64_t channels, const LayerNorm& norm, float* to) {
  const float *weight = norm.weight ? data(*norm.weight) : nullptr, *bias = norm.bias ? data(*norm.bias) : nullptr;
  for (int64_t row = 0; row < rows; ++row, from += channels, to += channels) {
    Lanes sum{}, square{};
    for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) { sum += load(from + c, lanes); });
    const float mean = total(sum) / channels;
    for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      store(to + c, load(from + c, lanes) - mean, lanes);
      const Lanes distance = load(to + c, lanes);  // 0 behind the last channel
      square += distance * distance;
    });
    const float inverse = 1.0f / std::sqrt(total(square) / channels + float(norm.eps));
    for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      Lanes value = load(to + c, lanes) * inverse;
      if (weight) value = value * load(weight + c, lanes) + load(bias + c, lanes);
      store(to + c, value, lanes);
    });
  }
}

}  // namespace

ChannelMLP::ChannelMLP(const LayerNorm& norm, const Tensor& expand, const Tensor& expand_bias, const Tensor& gamma,
                       const OptionalTensor& beta, double eps, const Tensor& reduce, const Tensor& reduce_bias)
    : norm_(norm),
      expand_(expand),
      reduce_(reduce),
      expand_bias_(expand_bias),
      gamma_(gamma),
      bias_(shifted_bias(reduce_bias, reduce, beta)),
      eps_(eps) {}

// One run of it, images or groups of them at a time.
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
        x_(data(x)),
        residual_(residual ? data(*residual) : nullptr),
        out_(mutable_data(out)),
        memory_(groups_.memory(groups_.size * pixels_ * hidden_, x.options())),
        scaled_(groups_.memory(scale_weights_ ? mlp.reduce_.size() : 0, x.options())) {}

  void run() const {
    groups_.for_each([&](int64_t image, int64_t images, int64_t thread) {
      const at::AutoDispatchBelowADInplaceOrView below;  // threads do not inherit it
      float* rows = mutable_data(memory_) + thread * memory_.size(1);
      std::vector<int64_t> place;  // of each row, where the numbers of its image begin
      for (const auto i : irange(images)) place.insert(place.end(), pixels_, i * hidden_);
      const Tensor factor = expand(image, images, place, rows);
      reduce(image, place, rows, data(factor), mutable_data(scaled_) + thread * scaled_.size(1));
    });
  }

 private:
  // Some images up to GELU, into `rows`; gives GRN's factor (images, E).
  Tensor expand(int64_t image, int64_t images, const std::vector<int64_t>& place, float* rows) const {
    const RowBlocks blocks(place.size(), hidden_);
    const Tensor squares = at::zeros({blocks.count, images, hidden_}, memory_.options());
    float* sums = mutable_data(squares);
    const float *from = x_ + image * pixels_ * channels_, *bias = data(mlp_.expand_bias_);
    blocks.for_each([&](int64_t block, int64_t begin, int64_t end, int64_t part) {
      const int64_t size = (end - begin) * channels_ / LANES + 1;
      float* normed = reinterpret_cast<float*>(Workspace(size).take(size));
      layer_norm(from + begin * channels_, end - begin, channels_, mlp_.norm_, normed);
      float* sum = sums + block * images * hidden_;
      multiply_rows({{normed, channels_, mlp_.expand_.block(0), channels_}}, 0, end - begin, hidden_, part, blocks.parts,
                    [&](int64_t row, int64_t c, Lanes value, int64_t count) {
                      const Lanes y = gelu(value + load(bias + c, count));
                      store(rows + (begin + row) * hidden_ + c, y, count);
                      add_to(sum + place[begin + row] + c, y * y, count);
                    });
    });
    return response_factor(response_norm(squares.sum(0)), mlp_.gamma_, mlp_.eps_);
  }

  // The rest: GRN's factor comes to the weights, in `scaled`, where there are fewer of them than pixels.
  void reduce(int64_t image, const std::vector<int64_t>& place, float* rows, const float* factor, float* scaled) const {
    const Lanes* weights = mlp_.reduce_.block(0);
    const float* bias = data(mlp_.bias_);
    if (scale_weights_) {
      mlp_.reduce_.scale(factor, reinterpret_cast<Lanes*>(scaled));
      weights = reinterpret_cast<const Lanes*>(scaled);
    }
    const RowBlocks blocks(place.size(), outputs_);
    const auto scale = [&](int64_t begin, int64_t end) {
      for (const auto row : irange(begin, end)) scale_row(rows + row * hidden_, factor + place[row], hidden_);
    };
    const bool scale_first = !scale_weights_ && blocks.parts > 1;
    if (scale_first) at::parallel_for(0, blocks.rows, 1, scale);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end, int64_t part) {
      if (!scale_weights_ && !scale_first) scale(begin, end);
      multiply_rows({{rows, hidden_, weights, hidden_}}, begin, end, outputs_, part, blocks.parts,
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
  const float *x_, *residual_;
  float* const out_;
  const Tensor memory_, scaled_;
};

Tensor ChannelMLP::run(const Tensor& x, const OptionalTensor& residual, Tensor out) const {
  TORCH_CHECK(expand_.depth == x.size(1), "a linear layer of ", expand_.depth, " channels does not fit a map ", x.sizes());
  if (!out.defined()) out = empty_map(x, reduce_.outputs);
  Run(*this, x, residual, out).run();
  return out;
}

namespace {

Tensor channel_mlp(const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                   double norm_eps, const Tensor& expand, const Tensor& expand_bias, const Tensor& gamma,
                   const OptionalTensor& beta, double eps, const Tensor& reduce, const Tensor& reduce_bias,
                   const OptionalTensor& residual) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return ChannelMLP({norm_weight, norm_bias, norm_eps}, expand, expand_bias, gamma, beta, eps, reduce, reduce_bias)
      .run(channels_last(x), residual ? channels_last(*residual) : residual);
}

// What the backward pass needs too: the rows after LayerNorm, its mean and inverse deviation, the hidden rows before GELU
// and without their bias, and GRN's norm.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_mlp_forward(
    const Tensor& map, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
    const Tensor& expand, const Tensor& expand_bias, const Tensor& gamma, const OptionalTensor& beta, double eps,
    const Tensor& reduce, const Tensor& reduce_bias) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor x = channels_last(map), out = empty_map(x, reduce.size(0));
  const auto [rows, mean, inverse] = at::native_layer_norm(pixels(x), {x.size(1)}, norm_weight, norm_bias, norm_eps);
  const Tensor hidden = rows.mm(expand.t()), y = at::empty_like(hidden);
  const Tensor norm = response_norm(gelu_square_sum(hidden, expand_bias, y, x.size(0)));
  scale_rows(y, response_factor(norm, gamma, eps));
  Tensor to = pixels(out);
  at::addmm_out(to, shifted_bias(reduce_bias, reduce, beta), y, reduce.t());
  return {out, rows, mean, inverse, hidden, norm};
}

// Of y = gelu(x + shift): y * factor (N, C), and the sums of y * grad (N, C).
std::tuple<Tensor, Tensor> gelu_scale(const Tensor& x, const Tensor& shift, const Tensor& factor, const Tensor& grad) {
  const Slices slices = slices_of(x, factor.size(0));
  const Tensor sums = slices.sums(x.options()), out = at::empty_like(x);
  const int64_t channels = slices.channels;
  const float* b = data(shift);
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    const float* times = data(factor) + slice / slices.per_image * channels;
    const float* from = data(x) + first * channels;
    const float* above = data(grad) + first * channels;
    float* to = mutable_data(out) + first * channels;
    for (int64_t row = first; row < end; ++row, from += channels, above += channels, to += channels) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes y = gelu(load(from + c, lanes) + load(b + c, lanes));
        store(to + c, y * load(times + c, lanes), lanes);
        add_to(sum + c, y * load(above + c, lanes), lanes);
      });
    }
  });
  return {out, sum_slices(sums)};
}

// Gradient of x, in place of grad: (grad * factor + y * slope) * gelu'(x + shift), and its sums (C, ).
Tensor gelu_scale_backward(const Tensor& grad, const Tensor& x, const Tensor& shift, const Tensor& factor,
                           const Tensor& slope) {
  const Slices slices = slices_of(x, factor.size(0));
  const Tensor sums = slices.sums(x.options());
  const int64_t channels = slices.channels;
  const float* b = data(shift);
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = mutable_data(sums) + slice * channels;
    const float* times = data(factor) + slice / slices.per_image * channels;
    const float* steep = data(slope) + slice / slices.per_image * channels;
    const float* from = data(x) + first * channels;
    float* to = mutable_data(grad) + first * channels;
    for (int64_t row = first; row < end; ++row, from += channels, to += channels) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes value = load(from + c, lanes) + load(b + c, lanes);
        const Lanes above = load(to + c, lanes) * load(times + c, lanes) + gelu(value) * load(steep + c, lanes);
        const Lanes out = above * gelu_slope(value);
        store(to + c, out, lanes);
        add_to(sum + c, out, lanes);
      });
    }
  });
  return sum_rows(sums.flatten(0, 1));
}

// What GRN hands on, given the sums (N, C) of gradient times y over the map: the gradient of gamma (C, ), and what times y
// comes to the gradient of y, (N, C).
std::tuple<Tensor, Tensor> response_backward(const Tensor& product, const Tensor& norm, const Tensor& gamma, double eps) {
  const int64_t channels = norm.size(1);
  const Tensor grad_gamma = at::zeros({channels}, norm.options()), slope = at::empty_like(norm);
  const float* scale = data(gamma);
  float* to_gamma = mutable_data(grad_gamma);
  for (const auto image : irange(norm.size(0))) {
    const float* g = data(norm) + image * channels;
    const float* sum = data(product) + image * channels;
    float* to = mutable_data(slope) + image * channels;
    const float mean = std::accumulate(g, g + channels, 0.0) / channels + eps;
    double shared = 0;  // the norm acts through the mean too
    for (const auto c : irange(channels)) {
      to_gamma[c] += sum[c] * g[c] / mean;
      shared += sum[c] * scale[c] * g[c] / mean;
    }
    for (const auto c : irange(channels)) {
      to[c] = (sum[c] * scale[c] - float(shared / channels)) / mean / g[c];
    }
  }
  return {grad_gamma, slope};
}

// Gradients of the map, LayerNorm's weight and bias, expand and its bias, gamma, beta, reduce and its bias; without an
// affine LayerNorm or without beta theirs are undefined.
std::vector<Tensor> channel_mlp_backward(const Tensor& grad, const Tensor& map, const OptionalTensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& expand,
                                         const Tensor& expand_bias, const Tensor& gamma, const OptionalTensor& beta,
                                         double eps, const Tensor& reduce, const Tensor& rows, const Tensor& mean,
                                         const Tensor& inverse, const Tensor& hidden, const Tensor& norm) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor x = channels_last(map), dense_grad = channels_last(grad), above = pixels(dense_grad);
  const Tensor grad_bias = sum_rows(above);
  const Tensor factor = response_factor(norm, gamma, eps);
  const Tensor grad_hidden = above.mm(reduce);
  const auto [y, product] = gelu_scale(hidden, expand_bias, factor, grad_hidden);
  Tensor grad_reduce = above.t().mm(y);
  if (beta) grad_reduce.addr_(grad_bias, *beta);
  const auto [grad_gamma, slope] = response_backward(product, norm, gamma, eps);
  const Tensor grad_expand_bias = gelu_scale_backward(grad_hidden, hidden, expand_bias, factor, slope);
  const Tensor grad_expand = grad_hidden.t().mm(rows);
  const bool affine = norm_weight.has_value();
  const auto [grad_x, grad_norm_weight, grad_norm_bias] =
      at::native_layer_norm_backward(grad_hidden.mm(expand), pixels(x), {x.size(1)}, mean, inverse, norm_weight,
                                     norm_bias, {true, affine, affine});
  const Tensor nothing = at::empty({0}, x.options());
  return {grad_x.view({x.size(0), x.size(2), x.size(3), x.size(1)}).permute({0, 3, 1, 2}),
          affine ? grad_norm_weight : nothing,
          affine ? grad_norm_bias : nothing,
          grad_expand,
          grad_expand_bias,
          grad_gamma,
          beta ? reduce.t().mv(grad_bias) : nothing,
          grad_reduce,
          grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("channel_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor expand,"
              " Tensor expand_bias, Tensor gamma, Tensor? beta, float eps, Tensor reduce, Tensor reduce_bias,"
              " Tensor? residual=None) -> Tensor");
  library.def("channel_mlp_forward(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor expand,"
              " Tensor expand_bias, Tensor gamma, Tensor? beta, float eps, Tensor reduce, Tensor reduce_bias)"
              " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("channel_mlp_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor expand,"
              " Tensor expand_bias, Tensor gamma, Tensor? beta, float eps, Tensor reduce, Tensor rows, Tensor mean,"
              " Tensor inverse, Tensor hidden, Tensor norm) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("channel_mlp", channel_mlp);
  library.impl("channel_mlp_forward", channel_mlp_forward);
  library.impl("channel_mlp_backward", channel_mlp_backward);
}

}  // namespace mmstrip
