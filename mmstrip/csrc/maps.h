// What the operators share about tensors. Maps are (N, C, H, W) in channels_last memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <vector>

namespace mmstrip {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor channels_last(const Tensor& map) {
  return map.contiguous(at::MemoryFormat::ChannelsLast);
}

// Memory beyond this is always fresh from the system, which clears it page by page as it is touched: in large pages that
// is several times quicker.
inline Tensor in_large_pages(Tensor tensor) {
#ifdef MADV_HUGEPAGE
  constexpr size_t threshold = 32 << 20, page = 4096;
  if (tensor.nbytes() > threshold) {
    const auto start = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(start), tensor.nbytes() - page, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

inline Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return in_large_pages(at::empty(sizes, options.memory_format(at::MemoryFormat::ChannelsLast)));
}

inline Tensor empty_map(const Tensor& like, int64_t channels) {
  return empty_map({like.size(0), channels, like.size(2), like.size(3)}, like.options());
}

inline Tensor empty_map(const Tensor& like) {
  return empty_map(like.sizes(), like.options());
}

// A map in channels_last memory as a matrix of pixels x channels, and an empty tensor as one.
inline Tensor pixels(const Tensor& map) {
  const int64_t channels = map.size(1);
  return map.as_strided({map.size(0) * map.size(2) * map.size(3), channels}, {channels, 1});
}

inline const float* data(const Tensor& tensor) {
  return tensor.const_data_ptr<float>();
}

inline float* mutable_data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<float>();
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Sums over pixels are taken slice by slice, so that their order does not depend on the threads.
constexpr int64_t SLICE = 128;

// Rows of images of so many pixels each, cut into slices that do not leave their image.
struct Slices {
  int64_t images, pixels, channels, per_image, count;

  Slices(int64_t images, int64_t pixels, int64_t channels)
      : images(images),
        pixels(pixels),
        channels(channels),
        per_image(divide_up(pixels, SLICE)),
        count(images * per_image) {}

  // Space for sums of all slices, (images, slices, channels).
  Tensor sums(const at::TensorOptions& options) const { return at::zeros({images, per_image, channels}, options); }

  // function(slice, first row, end) for all slices, rows counted over all images.
  template <typename Function>
  void for_each(Function function) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; ++slice) {
        const int64_t image = slice / per_image, first = slice % per_image * SLICE;
        function(slice, image * pixels + first, image * pixels + std::min(first + SLICE, pixels));
      }
    });
  }
};

// So many rows keep a matrix product busy and fit the second cache.
constexpr int64_t BLOCK_ROWS = 196;

inline int64_t free_threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// The rows of a product in blocks and, where there are too few rows for all threads, its columns in parts.
struct RowBlocks {
  int64_t rows, size, count, parts;

  RowBlocks(int64_t rows, int64_t columns) : rows(rows) {
    constexpr int64_t fewest = BLOCK_ROWS / 2, narrowest = 64;
    const int64_t threads = free_threads();
    size = std::clamp(divide_up(rows, threads), std::min(fewest, rows), BLOCK_ROWS);
    count = divide_up(rows, size);
    parts = std::clamp<int64_t>(threads / count, 1, divide_up(columns, narrowest));
  }

  // function(block, first row, end, part) in parallel.
  template <typename Function>
  void for_each(Function function) const {
    at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / parts;
        function(block, block * size, std::min((block + 1) * size, rows), task % parts);
      }
    });
  }
};

// Images that go through several steps one group after the other, so that what lies between stays in the cache: a group
// a thread where they come out even, else each on all threads.
struct Groups {
  int64_t images, pixels, size, count;
  bool side_by_side;

  // With `waves` a thread that is free may go on with another group's next step.
  Groups(int64_t images, int64_t pixels, bool waves = false) : images(images), pixels(pixels) {
    const int64_t threads = free_threads();
    split(BLOCK_ROWS);
    side_by_side = threads > 1 && (count % threads == 0 || count >= (waves ? 1 : 4) * threads);
    if (!side_by_side) split(BLOCK_ROWS * threads);
  }

  // Memory (threads, floats).
  Tensor memory(int64_t floats, const at::TensorOptions& options) const {
    return in_large_pages(at::empty({side_by_side ? at::get_num_threads() : 1, floats}, options));
  }

  // function(first image, images, thread)
  template <typename Function>
  void for_each(Function function) const {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        function(group * size, std::min(size, images - group * size), side_by_side ? at::get_thread_num() : 0);
      }
    };
    side_by_side ? at::parallel_for(0, count, 1, run) : run(0, count);
  }

 private:
  void split(int64_t rows) {
    size = std::clamp<int64_t>(divide_up(rows, pixels), 1, images);
    count = divide_up(images, size);
  }
};

// BN of x as x * scale + shift, all (C, ): the rows of a tensor (4, C).
struct BatchNorm {
  Tensor values;
  bool training;

  const float* mean() const { return data(values); }
  const float* inverse() const { return mean() + channels(); }
  const float* scale() const { return inverse() + channels(); }
  const float* shift() const { return scale() + channels(); }
  int64_t channels() const { return values.size(1); }
};

// Arguments of a BN layer; statistics are of x + bias.
struct BatchNormLayer {
  Tensor weight, bias, running_mean, running_variance;
  bool training;
  double momentum, eps;
};

struct BatchNormGrad {
  Tensor x, weight, bias;
};

// activations.cpp

// Sums (C, ) of a matrix (R, C) over its rows.
Tensor sum_rows(const Tensor& matrix);

// The layer as it stands for x, to which `bias` (C, ), if any, should have been added before. Training takes statistics of
// x, and moves the running ones.
BatchNorm batch_norm(const Tensor& x, const OptionalTensor& bias, const BatchNormLayer& layer);

// gelu(BN(x)), in equal parts of the channels.
void norm_gelu(const Tensor& x, const BatchNorm& norm, at::TensorList out);

BatchNormGrad norm_gelu_backward(at::TensorList grads, const Tensor& x, const BatchNorm& norm);

// Gradients of BN from that of its output, in whose place comes that of x, and the sums of that over the map, and of its
// product with x - mean: (C, ).
BatchNormGrad batch_norm_backward(const Tensor& grad, const Tensor& x, const BatchNorm& norm, const Tensor& sums,
                                  const Tensor& products);

// depthwise.cpp

// Weights (1 or N, C, taps) of depthwise kernels, the rows as wide as `rows` says, in the order of their use.
struct Taps {
  std::vector<int64_t> rows;
  int64_t kernels, channels, taps;
  Tensor loaded;  // (kernels, blocks of LANES channels, taps, LANES)

  Taps(const Tensor& weight, at::IntArrayRef rows);

  // Of a weight (C, 1, K_h, K_w).
  explicit Taps(const Tensor& weight);
};

// Convolution of x; of gelu(BN(x)) if there is a norm. An `addend` (1, C, H, W) comes to it, times `factor` (N, C).
Tensor depthwise(const Tensor& x, const Taps& weight, const BatchNorm* norm = nullptr, const Tensor& addend = {},
                 const Tensor& factor = {});

// Gradient of the weights, (N, C, taps), of each image.
Tensor depthwise_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef rows);

// Sums (N, C, taps) of what each tap sees of x.
Tensor tap_sums(const Tensor& x, at::IntArrayRef rows);

}  // namespace mmstrip
