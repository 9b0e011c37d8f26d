// Depthwise convolutions of maps with kernels of any outline.
//
// A kernel is given by the widths of its rows, each 1, 3, 5 or 7 and centered: (3, 3, 3), or (3, 3, 7, 7, 7, 3, 3) for
// the cross of a 7x3 and a 3x7 kernel. Taps are numbered row by row. Weights are (1, C, taps), or (N, C, taps) for one
// kernel per image.
#include <torch/library.h>

#include "gelu.h"
#include "layers.h"

namespace mmstrip {
namespace {

// Consecutive rows of one width; inner loops are compiled per width.
struct Band {
  int64_t width, rows;
};

struct Kernel {
  std::vector<Band> bands;
  int64_t height = 0, width = 0, taps = 0;

  explicit Kernel(at::IntArrayRef rows) {
    for (const auto row : rows) {
      if (bands.empty() || bands.back().width != row) bands.push_back({row, 0});
      ++bands.back().rows;
      ++height;
      taps += row;
      width = std::max(width, row);
    }
  }
};

// Sizes of a padded block of a map in a buffer: zeros around it, and lines of whole tiles.
struct Padded {
  int64_t top, left, line, size;

  Padded(const Kernel& kernel, int64_t height, int64_t width, int64_t tile)
      : top(kernel.height / 2),
        left(kernel.width / 2),
        line((width + tile - 1) / tile * tile + 2 * left),
        size((height + 2 * top) * line) {}

  int64_t inside() const { return top * line + left; }
};

// Always inlined, like its callers, to keep sums in registers.
template <typename Function>
__attribute__((always_inline)) inline void with_width(int64_t width, Function function) {
  switch (width) {
    case 1: return function(std::integral_constant<int, 1>());
    case 3: return function(std::integral_constant<int, 3>());
    case 5: return function(std::integral_constant<int, 5>());
    default: return function(std::integral_constant<int, 7>());
  }
}

template <int TILE>
__attribute__((always_inline)) inline void convolve_tile(const Kernel& kernel, const Lanes* x, int64_t line,
                                                         const Lanes* weight, Lanes (&sum)[TILE]) {
  for (const auto& band : kernel.bands) {
    const Lanes* first = x + (kernel.width - band.width) / 2;
    with_width(band.width, [&](auto width) __attribute__((always_inline)) {
      for (int64_t row = 0; row < band.rows; ++row) {
        for (int k = 0; k < width; ++k) {
          for (int t = 0; t < TILE; ++t) sum[t] += first[row * line + t + k] * weight[row * width + k];
        }
      }
    });
    x += band.rows * line;
    weight += band.rows * band.width;
  }
}

// Convolve a staged block and call finish(pixel, sum) for each pixel.
template <typename Finish>
void convolve(const Kernel& kernel, const Lanes* x, int64_t line, int64_t tile, const Lanes* weight, int64_t height,
              int64_t width, Finish finish) {
  const auto run = [&](auto TILE) {
    for (const auto h : irange(height)) {
      for (int64_t w = 0; w < width; w += TILE) {
        Lanes sum[TILE]{};
        convolve_tile<TILE>(kernel, x + h * line + w, line, weight, sum);
        for (int t = 0; t < TILE; ++t) {
          if (w + t < width) finish(h * width + w + t, sum[t]);
        }
      }
    }
  };
  tile == 7 ? run(std::integral_constant<int, 7>()) : run(std::integral_constant<int, 8>());
}

int64_t best_tile(int64_t width) { return divide_up(width, 7) * 7 <= divide_up(width, 8) * 8 ? 7 : 8; }

// Tasks are the blocks of LANES channels of all images, image by image, as neighboring channels share cache lines.
struct Blocks {
  at::ScalarType type;
  int64_t channels, per_image, tasks;

  explicit Blocks(const Tensor& x)
      : type(x.scalar_type()),
        channels(x.size(1)),
        per_image(divide_up(channels, LANES)),
        tasks(x.size(0) * per_image) {}

  int64_t image(int64_t task) const { return task / per_image; }
  int64_t first(int64_t task) const { return task % per_image * LANES; }
  int64_t count(int64_t task) const { return std::min(LANES, channels - first(task)); }

  // function(T(), begin, end) in parallel, for the type T of the map.
  template <typename Function>
  void for_each(Function function) const {
    with_type(type, [&](auto number) {
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { function(number, begin, end); });
    });
  }
};

// A norm's values for a block.
struct NormLanes {
  Lanes mean{}, scale{}, shift{};

  NormLanes(const BatchNorm* norm, int64_t first, int64_t count) {
    if (!norm) return;
    mean = load(norm->mean() + first, count);
    scale = load(norm->scale() + first, count);
    shift = load(norm->shift() + first, count);
  }
};

// Stage a block of an image, after norm and GELU if there is a norm.
template <typename T>
void stage_block(const T* from, const Tensor& x, int64_t count, Lanes* inside, int64_t line, const BatchNorm* norm,
                 const NormLanes& lanes) {
  const auto run = [&](auto function) {
    stage_pixels(from, x.size(2), x.size(3), x.size(1), count, inside, line, 1, function);
  };
  if (norm) {
    run([&](Lanes v, int64_t) { return gelu(v * lanes.scale + lanes.shift); });
  } else {
    run([](Lanes v, int64_t) { return v; });
  }
}

// Products of a tile of the gradient with the inputs of one kernel row's taps, summed over an image.
template <int TILE, int WIDTH>
void correlate(const Lanes* grad, const Lanes* x, int64_t line, int64_t height, int64_t width, Lanes* out) {
  Lanes sum[WIDTH]{};
  for (const auto h : irange(height)) {
    for (int64_t w = 0; w < width; w += TILE) {
      const Lanes* g = grad + h * line + w;
      const Lanes* v = x + h * line + w;
      for (int t = 0; t < TILE; ++t) {
        for (int k = 0; k < WIDTH; ++k) sum[k] += g[t] * v[t + k];
      }
    }
  }
  std::copy(sum, sum + WIDTH, out);
}

// The same for all rows of a kernel.
void correlate_rows(const Kernel& kernel, const Lanes* grad, const Lanes* x, int64_t line, int64_t tile, int64_t height,
                    int64_t width, Lanes* sum) {
  for (const auto& band : kernel.bands) {
    for (int64_t row = 0; row < band.rows; ++row, x += line, sum += band.width) {
      with_width(band.width, [&](auto WIDTH) {
        const auto run = tile == 7 ? correlate<7, WIDTH> : correlate<8, WIDTH>;
        run(grad, x + (kernel.width - band.width) / 2, line, height, width, sum);
      });
    }
  }
}

// Sums of the pixels of a line that each column of a kernel covers.
template <typename T>
void sum_line(const T* pixels, int64_t width, int64_t channels, int64_t count, std::vector<Lanes>& sums) {
  const int64_t middle = sums.size() / 2;
  Lanes total{};
  for (const auto w : irange(width)) {
    __builtin_prefetch(pixels + (w + 24) * channels);
    total += load(pixels + w * channels, count);
  }
  Lanes head{}, tail{};
  sums[middle] = total;
  for (int64_t offset = 1; offset <= middle; ++offset) {
    if (offset < width) {
      head += load(pixels + (offset - 1) * channels, count);
      tail += load(pixels + (width - offset) * channels, count);
    }
    sums[middle + offset] = offset < width ? total - head : Lanes{};
    sums[middle - offset] = offset < width ? total - tail : Lanes{};
  }
}

// Staged inputs for the gradients of a block: its gradient and, for the gradient of the weights, its input, after the
// norm if there is one.
struct StagedGrad {
  const Kernel& kernel;
  const Padded& padded;
  const bool weight;
  Workspace workspace;
  Lanes *grad, *x, *sums;

  StagedGrad(const Kernel& kernel, const Padded& padded, bool weight)
      : kernel(kernel),
        padded(padded),
        weight(weight),
        workspace(weight ? 2 * padded.size + kernel.taps : padded.size),
        grad(workspace.take_zeros(padded.size)),
        x(weight ? workspace.take_zeros(padded.size) : nullptr),
        sums(weight ? workspace.take(kernel.taps) : nullptr) {}

  // Stage maps of T, and store the gradient of the weights in `out` (N, C, taps) if it is required.
  template <typename T>
  void run(const Blocks& blocks, int64_t task, const Tensor& from_grad, const Tensor& from, const BatchNorm* norm,
           const NormLanes& lanes, float* out) {
    const int64_t height = from.size(2), width = from.size(3), count = blocks.count(task);
    const int64_t channel = blocks.image(task) * blocks.channels + blocks.first(task);
    const int64_t offset = blocks.image(task) * height * width * blocks.channels + blocks.first(task);
    stage_block(data<T>(from_grad) + offset, from, count, grad + padded.inside(), padded.line, nullptr, lanes);
    if (!weight) return;
    stage_block(data<T>(from) + offset, from, count, x + padded.inside(), padded.line, norm, lanes);
    correlate_rows(kernel, grad + padded.inside(), x, padded.line, best_tile(width), height, width, sums);
    scatter(sums, kernel.taps, out + channel * kernel.taps, kernel.taps, count);
  }
};

// Weights (C, 1, K_h, K_w) as (1, C, taps), and the widths of their rows.
Tensor flat(const Tensor& weight) { return weight.flatten(1).unsqueeze(0); }

std::vector<int64_t> rows_of(const Tensor& weight) { return std::vector<int64_t>(weight.size(2), weight.size(3)); }

// Refuse weights that are not (C, 1, K_h, K_w) of a kernel that Kernel takes.
void check_weight(const Tensor& weight, int64_t channels) {
  check(weight, "weight", {channels, 1, ANY, ANY});
  const int64_t height = weight.size(2), width = weight.size(3);
  TORCH_CHECK(height % 2 == 1 && width % 2 == 1 && width <= 7,
              "weight must have an odd height and a width of 1, 3, 5 or 7, but has shape ", weight.sizes());
}

// A block's part of the weights.
const Lanes* taps_of(const PackedKernels& weight, const Blocks& blocks, int64_t task) {
  const int64_t kernel = weight.kernels == 1 ? task % blocks.per_image : task;
  return as_lanes(weight.packed) + kernel * weight.taps;
}

}  // namespace

PackedKernels::PackedKernels(const Tensor& input, at::IntArrayRef rows)
    : rows(rows.vec()), kernels(input.size(0)), channels(input.size(1)), taps(input.size(2)) {
  const Tensor weight = input.to(at::kFloat).contiguous();
  const Blocks blocks(weight);
  packed = at::empty({kernels, blocks.per_image, taps, LANES}, weight.options());
  Lanes* to = as_lanes(packed);
  at::parallel_for(0, blocks.tasks, 128, [&](int64_t begin, int64_t end) {
    for (const auto task : irange(begin, end)) {
      const float* lines[LANES];
      for (const auto lane : irange(LANES)) {
        const int64_t channel = std::min(blocks.first(task) + lane, channels - 1);
        lines[lane] = data(weight) + (blocks.image(task) * channels + channel) * taps;
      }
      gather(lines, taps, to + task * taps);
    }
  });
}

PackedKernels::PackedKernels(const Tensor& weight) : PackedKernels(flat(weight), rows_of(weight)) {}

PackedKernels PackedKernels::reversed(const Tensor& weight) {
  return PackedKernels(flat(weight).flip(2), rows_of(weight));
}

Tensor depthwise(const Tensor& x, const PackedKernels& weight, const BatchNorm* norm, const Tensor& addend,
                 const Tensor& factor) {
  const Kernel kernel(weight.rows);
  const Blocks blocks(x);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t tile = best_tile(width), pixels = height * width;
  const Padded padded(kernel, height, width, tile);
  const Tensor out = empty_map(x);
  blocks.for_each([&](auto type, int64_t begin, int64_t end) {
    using T = decltype(type);
    Workspace workspace(padded.size);
    Lanes* buffer = workspace.take_zeros(padded.size);
    for (const auto task : irange(begin, end)) {
      const int64_t first = blocks.first(task), count = blocks.count(task);
      const int64_t offset = blocks.image(task) * pixels * channels + first;
      stage_block(data<T>(x) + offset, x, count, buffer + padded.inside(), padded.line, norm,
                  NormLanes(norm, first, count));
      const Lanes* kernels = taps_of(weight, blocks, task);
      T* to = mutable_data<T>(out) + offset;
      const auto run = [&](auto finish) {
        convolve(kernel, buffer, padded.line, tile, kernels, height, width, finish);
      };
      if (addend.defined()) {
        const Lanes times = load(data(factor) + blocks.image(task) * channels + first, count);
        const float* added = data(addend) + first;
        run([&](int64_t pixel, Lanes sum) {
          store(to + pixel * channels, sum + load(added + pixel * channels, count) * times, count);
        });
      } else {
        run([&](int64_t pixel, Lanes sum) { store(to + pixel * channels, sum, count); });
      }
    }
  });
  return out;
}

Tensor depthwise_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef rows) {
  const Kernel kernel(rows);
  const Blocks blocks(x);
  const Padded padded(kernel, x.size(2), x.size(3), best_tile(x.size(3)));
  const Tensor out = at::empty({x.size(0), blocks.channels, kernel.taps}, at::kFloat);
  blocks.for_each([&](auto type, int64_t begin, int64_t end) {
    StagedGrad staged(kernel, padded, true);
    for (const auto task : irange(begin, end)) {
      staged.run<decltype(type)>(blocks, task, grad, x, nullptr, NormLanes(nullptr, 0, 0), mutable_data(out));
    }
  });
  return out;
}

// Sums of whole lines minus the ends that a tap does not cover.
Tensor tap_sums(const Tensor& x, at::IntArrayRef rows) {
  const Kernel kernel(rows);
  const Blocks blocks(x);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const Tensor out = at::empty({x.size(0), channels, kernel.taps}, at::kFloat);
  blocks.for_each([&](auto type, int64_t begin, int64_t end) {
    std::vector<Lanes> line(kernel.width), sums(kernel.taps);
    for (const auto task : irange(begin, end)) {
      const int64_t first = blocks.first(task), count = blocks.count(task);
      const auto* from = data<decltype(type)>(x) + blocks.image(task) * height * width * channels + first;
      std::fill(sums.begin(), sums.end(), Lanes{});
      for (int64_t h = 0; h < height; ++h, from += width * channels) {
        sum_line(from, width, channels, count, line);
        Lanes* sum = sums.data();
        for (const auto row : irange(kernel.height)) {
          const int64_t target = h + kernel.height / 2 - row;  // the output line that this tap contributes to
          const Lanes* seen = line.data() + (kernel.width - rows[row]) / 2;
          for (const auto k : irange(rows[row])) {
            if (target >= 0 && target < height) sum[k] += seen[k];
          }
          sum += rows[row];
        }
      }
      float* to = mutable_data(out) + (blocks.image(task) * channels + first) * kernel.taps;
      scatter(sums.data(), kernel.taps, to, kernel.taps, count);
    }
  });
  return out;
}

namespace {

struct DepthwiseGrad {
  Tensor x, weight;       // undefined unless required
  Tensor sums, products;  // with a norm, for batch_norm_backward: x is then the gradient of the norm's output
};

// Gradients of x and of the weight (C, 1, K_h, K_w). The norm's sums are computed if `norm_required`.
DepthwiseGrad depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool x_required,
                                 bool weight_required, const BatchNorm* norm = nullptr, bool norm_required = false) {
  if (!x_required && !weight_required && !norm_required) return {};
  const auto reversed = PackedKernels::reversed(weight);
  const Kernel kernel(reversed.rows);
  const Blocks blocks(x);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t tile = best_tile(width), pixels = height * width;
  const Padded padded(kernel, height, width, tile);
  const Tensor out = x_required ? empty_map(x) : Tensor();
  const Tensor weights = at::empty({weight_required ? images : 0, channels, kernel.taps}, at::kFloat);
  const Tensor sums = at::empty({2, norm_required ? images : 0, channels}, at::kFloat);
  blocks.for_each([&](auto type, int64_t begin, int64_t end) {
    using T = decltype(type);
    StagedGrad staged(kernel, padded, weight_required);
    for (const auto task : irange(begin, end)) {
      const int64_t image = blocks.image(task), first = blocks.first(task), count = blocks.count(task);
      const int64_t offset = image * pixels * channels + first, channel = image * channels + first;
      const NormLanes lanes(norm, first, count);
      const T* from = data<T>(x) + offset;
      T* to = x_required ? mutable_data<T>(out) + offset : nullptr;
      staged.run<T>(blocks, task, grad, x, norm, lanes, mutable_data(weights));
      const auto run = [&](auto finish) {
        convolve(kernel, staged.grad, padded.line, tile, taps_of(reversed, blocks, task), height, width, finish);
      };
      if (norm_required) {
        Lanes sum{}, product{};
        run([&](int64_t pixel, Lanes grad_out) {
          const Lanes value = load(from + pixel * channels, count);
          const Lanes gradient = grad_out * gelu_slope(value * lanes.scale + lanes.shift);
          sum += gradient;
          product += gradient * (value - lanes.mean);
          if (to) store(to + pixel * channels, gradient, count);
        });
        store(mutable_data(sums) + channel, sum, count);
        store(mutable_data(sums) + images * channels + channel, product, count);
      } else if (to) {
        run([&](int64_t pixel, Lanes sum) { store(to + pixel * channels, sum, count); });
      }
    }
  });
  DepthwiseGrad result{out, {}, {}, {}};
  if (weight_required) result.weight = sum_rows(weights.flatten(1)).view(weight.sizes());
  if (norm_required) result.sums = sum_rows(sums[0]), result.products = sum_rows(sums[1]);
  return result;
}

Tensor run_depthwise(const Tensor& input, const Tensor& weight) {
  const BelowAutograd guard;
  check_map(input, "x");
  check_weight(weight, input.size(1));
  return depthwise(in_channels_last(input), PackedKernels(weight));
}

std::tuple<Tensor, Tensor> run_depthwise_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                  std::array<bool, 2> required) {
  const BelowAutograd guard;
  check_map(input, "x"), check_map(grad, "grad", input.sizes());
  check_weight(weight, input.size(1));
  const Tensor x = in_channels_last(input);
  const auto out = depthwise_backward(in_channels_last(grad), x, weight, required[0], required[1]);
  return {out.x, out.weight};
}

// Also returns the norm for norm_gelu_depthwise_backward.
std::tuple<Tensor, Tensor> norm_gelu_depthwise(const Tensor& input, const Tensor& weight, const Tensor& norm_weight,
                                               const Tensor& norm_bias, const Tensor& mean, const Tensor& variance,
                                               bool training, double momentum, double eps) {
  const BelowAutograd guard;
  check_map(input, "x");
  check_weight(weight, input.size(1));
  const BatchNormLayer layer{norm_weight, norm_bias, mean, variance, training, momentum, eps};
  layer.check(input.size(1));
  const Tensor x = in_channels_last(input);
  const auto norm = batch_norm(layer, x.size(1), x);
  return {depthwise(x, PackedKernels(weight), &norm), norm.values};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_gelu_depthwise_backward(const Tensor& grad, const Tensor& input,
                                                                        const Tensor& weight, const Tensor& values,
                                                                        bool training, std::array<bool, 4> required) {
  const BelowAutograd guard;
  check_map(input, "x"), check_map(grad, "grad", input.sizes());
  check_weight(weight, input.size(1));
  const auto norm = BatchNorm::saved(values, input.size(1), training);
  const Tensor x = in_channels_last(input);
  const bool norm_required = required[0] || required[2] || required[3];
  const auto inner =
      depthwise_backward(in_channels_last(grad), x, weight, required[0], required[1], &norm, norm_required);
  BatchNormGrad outer;
  if (norm_required) outer = batch_norm_backward(inner.x, x, norm, inner.sums, inner.products);
  return {outer.x, inner.weight, required[2] ? outer.weight : Tensor(), required[3] ? outer.bias : Tensor()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("depthwise(Tensor x, Tensor weight) -> Tensor");
  library.def("depthwise_backward(Tensor grad, Tensor x, Tensor weight, bool[2] required) -> (Tensor, Tensor)");
  library.def(
      "norm_gelu_depthwise(Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor(a!) mean,"
      " Tensor(b!) variance, bool training, float momentum, float eps) -> (Tensor, Tensor)");
  library.def(
      "norm_gelu_depthwise_backward(Tensor grad, Tensor x, Tensor weight, Tensor norm, bool training,"
      " bool[4] required) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("depthwise", run_depthwise);
  library.impl("depthwise_backward", run_depthwise_backward);
  library.impl("norm_gelu_depthwise", norm_gelu_depthwise);
  library.impl("norm_gelu_depthwise_backward", norm_gelu_depthwise_backward);
}

}  // namespace mmstrip
