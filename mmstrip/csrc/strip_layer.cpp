// Strip MLP layer (Section 3.2): channels of different patches side by side, so that no map is rearranged.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "lanes.h"

namespace mmstrip {
namespace {

// A tile of the product: so many lines and so many tokens fill the registers.
#ifdef __AVX512F__
constexpr int LINES = 7, TOKENS = 3;
#else
constexpr int LINES = 4, TOKENS = 2;
#endif

// A map as lines of tokens, with distances in pixels.
struct Lines {
  int64_t lines, tokens, line, token;

  Lines(const at::Tensor& x, bool row)
      : lines(x.size(row ? 2 : 3)),
        tokens(x.size(row ? 3 : 2)),
        line(row ? x.size(3) : 1),
        token(row ? 1 : x.size(3)) {}
};

int64_t whole_tiles(int64_t lines) {
  return (lines + LINES - 1) / LINES * LINES;
}

// Weights (G, strip_width, L, L) of the patches of LANES channels, as (strip_width * L * L) vectors.
void load_weight(const at::Tensor& weight, int64_t first, Lanes* out) {
  const int64_t patches = weight.size(0), size = weight.stride(0);
  const float* rows[LANES];
  for (const auto lane : irange(LANES)) {
    rows[lane] = weight.const_data_ptr<float>() + (first + lane) % patches * size;
  }
  gather(rows, size, out);
}

// Weights (strip_width, out, in) in the order of their use: tiles of out tokens, in each (strip_width, in, tile). For the
// gradient of the input lines and tokens change roles.
void arrange(const Lanes* weight, int64_t strip_width, int64_t tokens, bool backward, Lanes* arranged) {
  for (int64_t tile = 0; tile < tokens; tile += TOKENS) {
    const int64_t end = std::min<int64_t>(tile + TOKENS, tokens);
    for (const auto k : irange(strip_width)) {
      for (const auto in : irange(tokens)) {
        for (int64_t out = tile; out < end; ++out) {
          *arranged++ = backward ? weight[((strip_width - 1 - k) * tokens + in) * tokens + out]
                                 : weight[(k * tokens + out) * tokens + in];
        }
      }
    }
  }
}

struct Target {
  float* data;
  int64_t line, token, count;  // distances in floats, lanes to store
};

// Tile of the sum for lines [0, LINES) and T tokens; only `lines` of them are stored.
template <int T>
void multiply(const Lanes* x, const Lanes* weight, int64_t strip_width, int64_t tokens, const Lanes* bias,
              int64_t bias_line, Target to, int64_t lines) {
  Lanes sum[LINES][T];
  for (int j = 0; j < LINES; ++j) {
    for (int t = 0; t < T; ++t) sum[j][t] = bias[j * bias_line + t];
  }
  for (int64_t i = 0; i < strip_width; ++i, x += tokens) {
    for (int64_t in = 0; in < tokens; ++in, weight += T) {
      for (int j = 0; j < LINES; ++j) {
        const Lanes value = in_register(x[j * tokens + in]);
        for (int t = 0; t < T; ++t) sum[j][t] += value * weight[t];
      }
    }
  }
  for (int j = 0; j < LINES; ++j) {
    if (j >= lines) break;
    for (int t = 0; t < T; ++t) store(to.data + j * to.line + t * to.token, sum[j][t], to.count);
  }
}

void multiply_image(const Lanes* x, const Lanes* weight, int64_t strip_width, const Lines& shape, const Lanes* bias,
                    int64_t bias_line, Target to) {
  for (int64_t tile = 0; tile < shape.tokens; tile += TOKENS) {
    const int64_t size = std::min<int64_t>(TOKENS, shape.tokens - tile);
    const auto run = size == 1 ? multiply<1> : size == 2 ? multiply<2> : multiply<TOKENS>;
    for (int64_t line = 0; line < shape.lines; line += LINES) {
      Target here = to;
      here.data += line * to.line + tile * to.token;
      run(x + line * shape.tokens, weight, strip_width, shape.tokens, bias + line * bias_line + tile, bias_line, here,
          shape.lines - line);
    }
    weight += strip_width * shape.tokens * size;
  }
}

at::Tensor pixels_first(const at::Tensor& map) {
  return map.permute({1, 2, 0}).contiguous();
}

at::Tensor run(const at::Tensor& x, const std::optional<at::Tensor>& position, const at::Tensor& weight,
               const std::optional<at::Tensor>& bias, bool row, bool backward) {
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const int64_t patches = weight.size(0), strip_width = weight.size(1);
  const Lines shape(x, row);
  TORCH_CHECK(shape.tokens == weight.size(2) && shape.tokens == weight.size(3) && channels % patches == 0,
              "strip weights ", weight.sizes(), " do not fit a map ", x.sizes());
  TORCH_CHECK(!position || position->sizes() == x.sizes().slice(1), "positions do not fit the map");
  const int64_t tokens = shape.tokens, all_lines = whole_tiles(shape.lines), pad = strip_width / 2;
  const bool bias_map = bias && bias->dim() == 3;
  TORCH_CHECK(!bias || (bias_map ? bias->sizes() == x.sizes().slice(1) : bias->numel() == patches * tokens),
              "biases do not fit the map");
  const at::Tensor positions = position ? pixels_first(*position) : at::Tensor();
  const at::Tensor biases = bias_map ? pixels_first(*bias) : bias ? bias->contiguous() : at::Tensor();
  const int64_t bias_line = bias_map ? tokens : 0;
  const at::Tensor out = empty_map(x);
  for_blocks(channels, images, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> buffer((all_lines + 2 * pad) * tokens), loaded(strip_width * tokens * tokens), arranged(loaded.size());
    std::vector<Lanes> bias_lanes(bias_map ? all_lines * tokens : tokens), position_lanes(position ? pixels : 0);
    const auto copy = [](Lanes v, int64_t) { return v; };
    for (const auto task : irange(begin, end)) {
      const int64_t first = task / images * LANES, image = task % images, count = lanes_left(channels, first);
      if (task == begin || image == 0) {
        load_weight(weight, first, loaded.data());
        arrange(loaded.data(), strip_width, tokens, backward, arranged.data());
        if (position) {
          stage(positions.const_data_ptr<float>() + first, 1, pixels, channels, count, position_lanes.data(), 0, 1, copy);
        }
        if (bias_map) {
          stage(biases.const_data_ptr<float>() + first, x.size(2), x.size(3), channels, count, bias_lanes.data(),
                row ? tokens : 1, row ? 1 : tokens, copy);
        } else if (bias) {
          const float* rows[LANES];
          for (const auto lane : irange(LANES)) {
            rows[lane] = biases.const_data_ptr<float>() + (first + lane) % patches * tokens;
          }
          gather(rows, tokens, bias_lanes.data());
        }
      }
      const int64_t offset = image * pixels * channels + first;
      const auto stage_image = [&](auto function) {
        stage(x.const_data_ptr<float>() + offset, x.size(2), x.size(3), channels, count, buffer.data() + pad * tokens,
              row ? tokens : 1, row ? 1 : tokens, function);
      };
      if (position) {
        stage_image([&](Lanes v, int64_t pixel) { return v + position_lanes[pixel]; });
      } else {
        stage_image(copy);
      }
      const Target to{out.mutable_data_ptr<float>() + offset, shape.line * channels, shape.token * channels, count};
      multiply_image(buffer.data(), arranged.data(), strip_width, shape, bias_lanes.data(), bias_line, to);
    }
  });
  return out;
}

at::Tensor strip_layer(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, bool row,
                       const std::optional<at::Tensor>& position) {
  return run(x, position, weight, bias, row, false);
}

at::Tensor strip_layer_input_grad(const at::Tensor& grad, const at::Tensor& weight, bool row) {
  return run(grad, {}, weight, {}, row, true);
}

// Products of T x U tokens of the gradient and of the input, added up over the lines of an image.
template <int T, int U>
void correlate(const Lanes* grad, const Lanes* x, int64_t lines, int64_t tokens, Lanes* out) {
  Lanes sum[T][U];
  for (int t = 0; t < T; ++t) std::copy(out + t * tokens, out + t * tokens + U, sum[t]);
  for (int64_t line = 0; line < lines; ++line, grad += tokens, x += tokens) {
    for (int t = 0; t < T; ++t) {
      const Lanes value = in_register(grad[t]);
      for (int u = 0; u < U; ++u) sum[t][u] += value * x[u];
    }
  }
  for (int t = 0; t < T; ++t) std::copy(sum[t], sum[t] + U, out + t * tokens);
}

void correlate_image(const Lanes* grad, const Lanes* x, const Lines& shape, Lanes* out) {
  constexpr int SIDE = LINES / 7 + 3;
  for (int64_t t = 0; t < shape.tokens;) {
    const bool tall = t + SIDE <= shape.tokens;
    for (int64_t u = 0; u < shape.tokens;) {
      const bool wide = u + SIDE <= shape.tokens;
      const auto run = tall ? (wide ? correlate<SIDE, SIDE> : correlate<SIDE, 1>)
                            : (wide ? correlate<1, SIDE> : correlate<1, 1>);
      run(grad + t, x + u, shape.lines, shape.tokens, out + t * shape.tokens + u);
      u += wide ? SIDE : 1;
    }
    t += tall ? SIDE : 1;
  }
}

// Gradient of the weights (G, strip_width, L, L): a task is a block of channels and a line of the strip.
at::Tensor strip_layer_weight_grad(const at::Tensor& grad, const at::Tensor& x, int64_t patches, int64_t strip_width,
                                   bool row, const std::optional<at::Tensor>& position) {
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Lines shape(x, row);
  const int64_t tokens = shape.tokens, square = tokens * tokens, pad = strip_width / 2;
  const at::Tensor positions = position ? pixels_first(*position) : at::Tensor();
  const at::Tensor out = at::empty({channels, strip_width, tokens, tokens}, x.options());
  at::parallel_for(0, (channels + LANES - 1) / LANES * strip_width, 1, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> staged((shape.lines + 2 * pad) * tokens), staged_grad(shape.lines * tokens), sum(square);
    std::vector<Lanes> position_lanes(pixels);
    for (const auto task : irange(begin, end)) {
      const int64_t first = task / strip_width * LANES, k = task % strip_width, count = lanes_left(channels, first);
      const int64_t to_line = row ? tokens : 1, to_token = row ? 1 : tokens;
      const auto copy = [](Lanes v, int64_t) { return v; };
      if (position) {
        stage(positions.const_data_ptr<float>() + first, 1, pixels, channels, count, position_lanes.data(), 0, 1, copy);
      }
      std::fill(sum.begin(), sum.end(), Lanes{});
      for (const auto image : irange(images)) {
        const int64_t offset = image * pixels * channels + first;
        stage(x.const_data_ptr<float>() + offset, x.size(2), x.size(3), channels, count, staged.data() + pad * tokens,
              to_line, to_token, [&](Lanes v, int64_t pixel) { return v + position_lanes[pixel]; });
        stage(grad.const_data_ptr<float>() + offset, x.size(2), x.size(3), channels, count, staged_grad.data(), to_line,
              to_token, copy);
        correlate_image(staged_grad.data(), staged.data() + k * tokens, shape, sum.data());
      }
      scatter(sum.data(), square, out.mutable_data_ptr<float>() + (first * strip_width + k) * square,
              strip_width * square, count);
    }
  });
  return out.view({channels / patches, patches, strip_width, tokens, tokens}).sum(0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("strip_layer(Tensor x, Tensor weight, Tensor bias, bool row, Tensor? position=None) -> Tensor");
  library.def("strip_layer_input_grad(Tensor grad, Tensor weight, bool row) -> Tensor");
  library.def("strip_layer_weight_grad(Tensor grad, Tensor x, int patches, int strip_width, bool row,"
              " Tensor? position=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("strip_layer", strip_layer);
  library.impl("strip_layer_input_grad", strip_layer_input_grad);
  library.impl("strip_layer_weight_grad", strip_layer_weight_grad);
}

}  // namespace mmstrip
