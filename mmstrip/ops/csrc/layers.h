// Layers whose weights are packed once, in the order of their use, and can run many times.
#pragma once

#include <deque>

#include "batch_norm.h"
#include "matmul.h"

namespace mmstrip {

// depthwise.cpp

// Weights (1 or N, C, taps) of depthwise kernels with rows of widths `rows`.
struct PackedKernels {
  std::vector<int64_t> rows;
  int64_t kernels, channels, taps;
  Tensor packed;  // (kernels, blocks of LANES channels, taps, LANES)

  PackedKernels(const Tensor& weight, at::IntArrayRef rows);

  // From a weight (C, 1, K_h, K_w).
  explicit PackedKernels(const Tensor& weight);

  // With taps in reverse order, for the gradient of the input.
  static PackedKernels reversed(const Tensor& weight);
};

// Convolution of x, or of gelu(BN(x)) if there is a norm, plus `addend` (1, C, H, W) times `factor` (N, C).
Tensor depthwise(const Tensor& x, const PackedKernels& weight, const BatchNorm* norm = nullptr,
                 const Tensor& addend = {}, const Tensor& factor = {});

// Gradient (N, C, taps) of the weights, per image.
Tensor depthwise_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef rows);

// Sums (N, C, taps) of the values of x that each tap covers.
Tensor tap_sums(const Tensor& x, at::IntArrayRef rows);

// pointwise.cpp

// 1x1 convolution of concatenated maps of a type, one matrix product per map.
class Pointwise {
 public:
  // Weight (O, sum of `channels`, 1, 1), bias (O, ) or none.
  Pointwise(const Tensor& weight, at::IntArrayRef channels, at::ScalarType type, const OptionalTensor& bias = {});

  // Like multiply_rows, for all pixels of maps of T, in parallel; without the bias.
  template <typename T, typename Finish>
  void for_each(at::TensorList maps, Finish finish) const {
    std::vector<Operand<T>> operands;
    for (const auto i : irange(maps.size())) {
      const int64_t channels = packed_[i].depth;
      operands.push_back({data<T>(maps[i]), channels, packed_[i].template packed<T>(), channels});
    }
    const RowBlocks blocks(maps[0].numel() / maps[0].size(1), outputs_);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end, int64_t part) {
      multiply_rows(at::ArrayRef<Operand<T>>(operands), begin, end, outputs_, part, blocks.parts, finish);
    });
  }

  // Plus an optional residual (N, O, H, W), into `out` (which may be the residual) or a new map.
  Tensor run(at::TensorList maps, const OptionalTensor& residual = {}, Tensor out = {}) const;

 private:
  int64_t outputs_;
  std::deque<PackedWeight> packed_;
  Tensor bias_;
};

// The same followed by BN with fixed statistics and GELU, in equal chunks of the channels.
class PointwiseNormGELU {
 public:
  PointwiseNormGELU(const Tensor& weight, at::IntArrayRef channels, at::ScalarType type, const BatchNorm& norm,
                    int64_t chunks = 1);

  std::vector<Tensor> run(at::TensorList maps) const;

 private:
  BatchNorm norm_;
  int64_t width_;
  std::vector<Pointwise> chunks_;
};

// strip_layer.cpp

// Strip MLP layer (Section 3.2), or the gradient of its input if `backward`.
class StripLayer {
 public:
  // Weight (G, strip_width, L, L); bias (G, L), (C, H, W) or none; position (C, H, W), added to the input, or none.
  StripLayer(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& position, bool row,
             bool backward = false);

  // Pack the weights for maps (C, H, W) now; otherwise every run packs them.
  void pack(at::IntArrayRef shape);

  // Refuse a map that does not fit the layer; `run` does so too.
  void check_fits(const Tensor& x) const;

  Tensor run(const Tensor& x) const;

 private:
  struct Layout;
  struct PackedBlock;

  void pack_block(const Layout& layout, int64_t first, Lanes* weight, const PackedBlock& packed) const;

  const Tensor weight_;
  const bool row_, backward_, bias_map_;
  Tensor bias_, position_;
  std::vector<int64_t> shape_;
  Tensor packed_;
};

// local_strips.cpp

// LSMM (Section 3.4).
class LocalStrips {
 public:
  // Kernels (C, 1, 7, 3) and (C, 1, 3, 7), and the two 1x1 convolutions of the MLP.
  LocalStrips(const Tensor& tall, const Tensor& wide, const Tensor& narrow, const Tensor& narrow_bias,
              const Tensor& broad, const Tensor& broad_bias);

  struct Result {
    Tensor out;
    // For backward: the sums under each tap (N, C, taps), the average (N, C), the MLP's hidden values before GELU
    // (N, M) and the weights of the paths (N, C, 3).
    Tensor sums, average, hidden, weights;
  };

  Result run(const Tensor& u) const;

 private:
  Tensor paths_, all_, narrow_, narrow_bias_, broad_, broad_bias_;
};

// channel_mlp.cpp

// Arguments of LayerNorm; both tensors are empty without an affine part.
struct LayerNorm {
  OptionalTensor weight, bias;
  double eps;
};

// LayerNorm, linear layer, GELU, GRN and linear layer, of maps of a type.
class ChannelMLP {
 public:
  // Weights (E, C) and (O, E) of the linear layers, gamma and beta (E, ) of GRN.
  ChannelMLP(at::ScalarType type, const LayerNorm& norm, const Tensor& expand, const Tensor& expand_bias,
             const Tensor& gamma, const OptionalTensor& beta, double eps, const Tensor& reduce,
             const Tensor& reduce_bias);

  // Plus an optional residual (N, O, H, W), into `out` (which may be the residual) or a new map.
  Tensor run(const Tensor& x, const OptionalTensor& residual = {}, Tensor out = {}) const;

 private:
  template <typename T>
  class Run;

  LayerNorm norm_;
  PackedWeight expand_, reduce_;
  Tensor expand_bias_, gamma_, bias_;
  double eps_;
};

// windows.cpp

// (N, C, H, W) to (N * rows * columns, C, *extent); with `mean`, times each window's weight in the mean of a pixel.
Tensor split_windows(const Tensor& x, at::IntArrayRef extent, at::IntArrayRef counts, at::IntArrayRef strides,
                     bool mean);

// Merge windows into a map (N, C, *size): per pixel the sum, or with `mean` the mean of the first and last window.
Tensor merge_windows(const Tensor& x, at::IntArrayRef size, at::IntArrayRef counts, at::IntArrayRef strides, bool mean);

}  // namespace mmstrip
