// Depthwise convolutions of maps, whatever the outline of the kernel.
//
// A kernel is given by the widths of its rows, each odd and centred: (3, 3, 3), or (3, 3, 7, 7, 7, 3, 3) for the cross of
// a 7x3 and a 3x7 kernel. Its taps are counted row by row. Weights are (1, C, taps), or (N, C, taps): a kernel per image.
#include <torch/library.h>

#include "lanes.h"

namespace mmstrip {
namespace {

// Rows of one width that follow each other, as inner loops are compiled for a width.
struct Band {
  int64_t width, rows;
};

struct Kernel {
  std::vector<Band> bands;
  int64_t height = 0, width = 0, taps = 0;

  explicit Kernel(at::IntArrayRef rows) {
    for (const auto row : rows) {
      TORCH_CHECK(row == 1 || row == 3 || row == 5 || row == 7, "rows of kernels are 1, 3, 5 or 7 wide, not ", row);
      if (bands.empty() || bands.back().width != row) bands.push_back({row, 0});
      ++bands.back().rows;
      ++height;
      taps += row;
      width = std::max(width, row);
    }
  }
};

// Sizes of a map's block in a buffer: zeros all round, and as many pixels a line as whole tiles need.
struct Padded {
  int64_t top, left, line, size;

  Padded(const Kernel& kernel, int64_t height, int64_t width, int64_t tile)
      : top(kernel.height / 2),
        left(kernel.width / 2),
        line((width + tile - 1) / tile * tile + 2 * left),
        size((height + 2 * top) * line) {}
};

template <typename Function>
void with_width(int64_t width, Function function) {
  switch (width) {
    case 1: return function(std::integral_constant<int, 1>());
    case 3: return function(std::integral_constant<int, 3>());
    case 5: return function(std::integral_constant<int, 5>());
    default: return function(std::integral_constant<int, 7>());
  }
}

template <int TILE>
inline void convolve_tile(const Kernel& kernel, const Lanes* x, int64_t line, const Lanes* weight, Lanes (&sum)[TILE]) {
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

template <int TILE>
void convolve(const Kernel& kernel, const Lanes* x, int64_t line, const Lanes* weight, float* out, int64_t height,
              int64_t width, int64_t channels, int64_t count) {
  for (const auto h : irange(height)) {
    for (int64_t w = 0; w < width; w += TILE) {
      Lanes sum[TILE]{};
      convolve_tile<TILE>(kernel, x + h * line + w, line, weight, sum);
      for (int t = 0; t < TILE; ++t) {
        if (w + t < width) store(out + (h * width + w + t) * channels, sum[t], count);
      }
    }
  }
}

int64_t best_tile(int64_t width) {
  return (width + 6) / 7 * 7 <= (width + 7) / 8 * 8 ? 7 : 8;
}

// Tasks are the blocks of LANES channels of all images, an image's blocks after each other: memory brings neighbouring
// channels along.
struct Blocks {
  int64_t channels, per_image, tasks;

  explicit Blocks(const at::Tensor& x)
      : channels(x.size(1)), per_image((channels + LANES - 1) / LANES), tasks(x.size(0) * per_image) {}

  int64_t image(int64_t task) const { return task / per_image; }
  int64_t first(int64_t task) const { return task % per_image * LANES; }
  int64_t count(int64_t task) const { return std::min(LANES, channels - first(task)); }
};

// Weights (1 or N, C, taps) block by block.
std::vector<Lanes> load_weight(const at::Tensor& any) {
  const at::Tensor weight = any.contiguous();
  const Blocks blocks(weight);
  const int64_t taps = weight.size(2);
  std::vector<Lanes> loaded(blocks.tasks * taps);
  at::parallel_for(0, blocks.tasks, 128, [&](int64_t begin, int64_t end) {
    for (const auto task : irange(begin, end)) {
      const float* rows[LANES];
      for (const auto lane : irange(LANES)) {
        const int64_t channel = std::min(blocks.first(task) + lane, blocks.channels - 1);
        rows[lane] = weight.const_data_ptr<float>() + (blocks.image(task) * blocks.channels + channel) * taps;
      }
      gather(rows, taps, loaded.data() + task * taps);
    }
  });
  return loaded;
}

// Convolution of (N, C, H, W); with a scale and a shift (C, ) of gelu(x * scale + shift).
at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef rows,
                     const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift) {
  const Kernel kernel(rows);
  const Blocks blocks(x);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  TORCH_CHECK(weight.size(1) == channels && weight.size(2) == kernel.taps, "weights do not fit a map of ", channels,
              " channels");
  TORCH_CHECK(!scale || (scale->numel() == channels && shift->numel() == channels), "scale does not fit");
  const int64_t tile = best_tile(width), pixels = height * width;
  const Padded padded(kernel, height, width, tile);
  const auto taps = load_weight(weight);
  const at::Tensor out = empty_map(x);
  at::parallel_for(0, blocks.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> buffer(padded.size);
    Lanes* inside = buffer.data() + padded.top * padded.line + padded.left;
    for (const auto task : irange(begin, end)) {
      const int64_t first = blocks.first(task), count = blocks.count(task);
      const int64_t offset = blocks.image(task) * pixels * channels + first;
      const float* from = x.const_data_ptr<float>() + offset;
      if (scale) {
        const Lanes a = load(scale->const_data_ptr<float>() + first, count);
        const Lanes b = load(shift->const_data_ptr<float>() + first, count);
        stage(from, height, width, channels, count, inside, padded.line, 1,
              [&](Lanes v, int64_t) { return gelu(v * a + b); });
      } else {
        stage(from, height, width, channels, count, inside, padded.line, 1, [](Lanes v, int64_t) { return v; });
      }
      const Lanes* kernels = taps.data() + (weight.size(0) == 1 ? task % blocks.per_image : task) * kernel.taps;
      const auto run = tile == 7 ? convolve<7> : convolve<8>;
      run(kernel, buffer.data(), padded.line, kernels, out.mutable_data_ptr<float>() + offset, height, width, channels,
          count);
    }
  });
  return out;
}

// Products of a tile of the gradient with what the taps of one kernel row see, added up over an image.
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

// Gradient of each image's weights (N, C, taps): sum over the map of grad times what each tap sees of x.
at::Tensor depthwise_weight_grad(const at::Tensor& grad, const at::Tensor& x, at::IntArrayRef rows) {
  const Kernel kernel(rows);
  const Blocks blocks(x);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t tile = best_tile(width), pixels = height * width;
  const Padded padded(kernel, height, width, tile);
  const at::Tensor out = at::empty({x.size(0), channels, kernel.taps}, x.options());
  at::parallel_for(0, blocks.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> staged(padded.size), staged_grad(padded.size), sums(kernel.taps);
    const auto copy = [](Lanes v, int64_t) { return v; };
    for (const auto task : irange(begin, end)) {
      const int64_t image = blocks.image(task), first = blocks.first(task), count = blocks.count(task);
      const int64_t offset = image * pixels * channels + first;
      Lanes* inside = staged.data() + padded.top * padded.line + padded.left;
      stage(x.const_data_ptr<float>() + offset, height, width, channels, count, inside, padded.line, 1, copy);
      stage(grad.const_data_ptr<float>() + offset, height, width, channels, count, staged_grad.data(), padded.line, 1,
            copy);
      const Lanes* seen = staged.data();
      Lanes* sum = sums.data();
      for (const auto& band : kernel.bands) {
        for (int64_t row = 0; row < band.rows; ++row, seen += padded.line, sum += band.width) {
          with_width(band.width, [&](auto WIDTH) {
            const auto run = tile == 7 ? correlate<7, WIDTH> : correlate<8, WIDTH>;
            run(staged_grad.data(), seen + (kernel.width - band.width) / 2, padded.line, height, width, sum);
          });
        }
      }
      float* to = out.mutable_data_ptr<float>() + (image * channels + first) * kernel.taps;
      scatter(sums.data(), kernel.taps, to, kernel.taps, count);
    }
  });
  return out;
}

// Sums of a line of pixels as each column of a kernel sees it.
void sum_line(const float* pixels, int64_t width, int64_t channels, int64_t count, std::vector<Lanes>& sums) {
  const int64_t middle = sums.size() / 2;
  Lanes total{};
  for (const auto w : irange(width)) total += load(pixels + w * channels, count);
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

// Sums (N, C, taps) of what each tap sees of x: of whole lines, less the ends that a tap does not reach.
at::Tensor tap_sums(const at::Tensor& x, at::IntArrayRef rows) {
  const Kernel kernel(rows);
  const Blocks blocks(x);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const at::Tensor out = at::empty({x.size(0), channels, kernel.taps}, x.options());
  at::parallel_for(0, blocks.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> line(kernel.width), sums(kernel.taps);
    for (const auto task : irange(begin, end)) {
      const int64_t first = blocks.first(task), count = blocks.count(task);
      const float* from = x.const_data_ptr<float>() + blocks.image(task) * height * width * channels + first;
      std::fill(sums.begin(), sums.end(), Lanes{});
      for (int64_t h = 0; h < height; ++h, from += width * channels) {
        sum_line(from, width, channels, count, line);
        Lanes* sum = sums.data();
        for (const auto row : irange(kernel.height)) {
          const int64_t target = h + kernel.height / 2 - row;  // the line of the output that sees this one
          const Lanes* seen = line.data() + (kernel.width - rows[row]) / 2;
          for (const auto k : irange(rows[row])) {
            if (target >= 0 && target < height) sum[k] += seen[k];
          }
          sum += rows[row];
        }
      }
      float* to = out.mutable_data_ptr<float>() + (blocks.image(task) * channels + first) * kernel.taps;
      scatter(sums.data(), kernel.taps, to, kernel.taps, count);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("depthwise(Tensor x, Tensor weight, int[] rows, Tensor? scale=None, Tensor? shift=None) -> Tensor");
  library.def("depthwise_weight_grad(Tensor grad, Tensor x, int[] rows) -> Tensor");
  library.def("tap_sums(Tensor x, int[] rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("depthwise", depthwise);
  library.impl("depthwise_weight_grad", depthwise_weight_grad);
  library.impl("tap_sums", tap_sums);
}

}  // namespace mmstrip
