// Strip MLP layer (Section 3.2), vectorized over channels of different patches, so that no map is rearranged.
#include <torch/library.h>

#include "layers.h"

namespace mmstrip {
namespace {

// A tile of the product: this many lines and tokens fill the registers.
#ifdef __AVX512F__
constexpr int LINES = 7, TOKENS = 3;
#else
constexpr int LINES = 4, TOKENS = 2;
#endif

// A map as lines of tokens, with distances in pixels.
struct Lines {
  int64_t lines, tokens, line, token;

  Lines(int64_t height, int64_t width, bool row)
      : lines(row ? height : width), tokens(row ? width : height), line(row ? width : 1), token(row ? 1 : width) {}
};

int64_t whole_tiles(int64_t lines) { return divide_up(lines, LINES) * LINES; }

// Weights (G, strip_width, L, L) of the patches of LANES channels, as (strip_width * L * L) vectors.
void load_weight(const Tensor& weight, int64_t first, Lanes* out) {
  const int64_t patches = weight.size(0), size = weight.numel() / patches;
  const float* rows[LANES];
  for (const auto lane : irange(LANES)) {
    rows[lane] = data(weight) + (first + lane) % patches * size;
  }
  gather(rows, size, out);
}

// Input tokens per chunk: what a tile reads of them and of the weights stays in the L1 cache.
int64_t chunk_size(int64_t tokens) {
  constexpr int64_t most = 28;
  const int64_t chunks = divide_up(tokens, most);
  return chunks == 1 ? tokens : divide_up(tokens, 2 * chunks);
}

// function(begin, end) for pieces of [0, count).
template <typename Function>
void for_pieces(int64_t count, int64_t size, Function function) {
  for (int64_t begin = 0; begin < count; begin += size) function(begin, std::min(begin + size, count));
}

// Weights (strip_width, out, in) in the order of their use: chunks of input tokens, then tiles of output tokens, then
// (strip_width, in, out). For the gradient of the input, lines and tokens change roles.
void arrange(const Lanes* weight, int64_t strip_width, int64_t tokens, bool backward, Lanes* arranged) {
  for_pieces(tokens, chunk_size(tokens), [&](int64_t first, int64_t last) {
    for_pieces(tokens, TOKENS, [&](int64_t begin, int64_t end) {
      for (const auto k : irange(strip_width)) {
        for (const auto in : irange(first, last)) {
          for (const auto out : irange(begin, end)) {
            *arranged++ = backward ? weight[((strip_width - 1 - k) * tokens + in) * tokens + out]
                                   : weight[(k * tokens + out) * tokens + in];
          }
        }
      }
    });
  });
}

template <typename T>
struct Target {
  T* data;
  int64_t line, token, count;  // distances in elements, lanes to store
};

// Initial sums of a tile, or buffers: lines x tokens with distances in vectors.
struct Start {
  const Lanes* data;
  int64_t line, token;
};

// A tile of the product, LINES x T, over `inputs` tokens of the lines of a strip; a token has `pitch` lines in a row.
template <int T, typename Finish>
void multiply(const Lanes* x, int64_t pitch, const Lanes* weight, int64_t strip_width, int64_t inputs, Start start,
              Finish finish) {
  Lanes sum[LINES][T];
  for (int j = 0; j < LINES; ++j) {
    for (int t = 0; t < T; ++t) sum[j][t] = start.data[j * start.line + t * start.token];
  }
  for (int64_t k = 0; k < strip_width; ++k) {
    const Lanes* lines = x + k;
    for (int64_t in = 0; in < inputs; ++in, weight += T, lines += pitch) {
      for (int j = 0; j < LINES; ++j) {
        const Lanes value = in_register(lines[j]);
        for (int t = 0; t < T; ++t) sum[j][t] += value * weight[t];
      }
    }
  }
  for (int j = 0; j < LINES; ++j) {
    for (int t = 0; t < T; ++t) finish(j, t, sum[j][t]);
  }
}

template <typename Function>
void with_tile(int64_t size, Function function) {
  size == 1   ? function(std::integral_constant<int, 1>())
  : size == 2 ? function(std::integral_constant<int, 2>())
              : function(std::integral_constant<int, TOKENS>());
}

// All lines of an image; `sums` (tokens, whole tiles of lines) accumulates over chunks of the input.
template <typename Number>
void multiply_image(const Lanes* x, int64_t pitch, const Lanes* weight, int64_t strip_width, const Lines& shape,
                    Start bias, Lanes* sums, Target<Number> to) {
  const int64_t tokens = shape.tokens, all_lines = whole_tiles(shape.lines);
  for_pieces(tokens, chunk_size(tokens), [&](int64_t first, int64_t last) {
    const Start start = first == 0 ? bias : Start{sums, 1, all_lines};
    for_pieces(tokens, TOKENS, [&](int64_t begin, int64_t end) {
      with_tile(end - begin, [&](auto T) {
        for (int64_t line = 0; line < shape.lines; line += LINES) {
          const auto run = [&](auto finish) {
            const Lanes* from = start.data + line * start.line + begin * start.token;
            multiply<T>(x + first * pitch + line, pitch, weight, strip_width, last - first,
                        {from, start.line, start.token}, finish);
          };
          if (last < tokens) {
            run([&](int64_t j, int64_t t, Lanes sum) { sums[(begin + t) * all_lines + line + j] = sum; });
          } else {
            run([&](int64_t j, int64_t t, Lanes sum) {
              Number* out = to.data + (line + j) * to.line + (begin + t) * to.token;
              if (line + j < shape.lines) store(out, sum, to.count);
            });
          }
        }
      });
      weight += strip_width * (last - first) * (end - begin);
    });
  });
}

// A parameter (C, H, W) as (H, W, C).
Tensor checked_pixels_first(const Tensor& map, const char* name) {
  check(map, name, {ANY, ANY, ANY});
  return map.to(at::kFloat).permute({1, 2, 0}).contiguous();
}

Tensor checked_weight(const Tensor& weight) {
  check(weight, "weight", {ANY, ANY, ANY, ANY});
  TORCH_CHECK(weight.numel() > 0 && weight.size(1) % 2 == 1 && weight.size(2) == weight.size(3),
              "weight must have shape [patches, strip_width, tokens, tokens] with an odd strip_width, but has ",
              weight.sizes());
  return weight.to(at::kFloat).contiguous();
}

Lanes identity(Lanes v, int64_t) { return v; }

}  // namespace

// Sizes: a map's lines, and the memory for a block of channels.
struct StripLayer::Layout : Lines {
  int64_t height, width, channels, pixels, all_lines, pad, pitch, whole, weights, biases, positions;

  Layout(const StripLayer& layer, at::IntArrayRef shape)  // (C, H, W)
      : Lines(shape[1], shape[2], layer.row_),
        height(shape[1]),
        width(shape[2]),
        channels(shape[0]),
        pixels(height * width),
        all_lines(whole_tiles(lines)),
        pad(layer.weight_.size(1) / 2),
        pitch(all_lines + 2 * pad),
        whole(all_lines * tokens),
        weights(layer.weight_.numel() / layer.weight_.size(0)),
        biases(layer.bias_map_ ? whole : tokens),
        positions(layer.position_.defined() ? pixels : 0) {
    const Tensor& weight = layer.weight_;
    TORCH_CHECK(tokens == weight.size(2) && channels % weight.size(0) == 0, "weight of shape ", weight.sizes(),
                " does not fit a map of shape ", shape);
    const auto fits = [&](const Tensor& map) {
      return map.size(0) == height && map.size(1) == width && map.size(2) == channels;
    };
    TORCH_CHECK(!layer.bias_map_ || fits(layer.bias_), "bias must have the map's shape ", shape);
    TORCH_CHECK(!layer.position_.defined() || fits(layer.position_), "position must have the map's shape ", shape);
  }

  int64_t packed() const { return weights + biases + positions; }
};

// Packed data of a block of channels: weights in the order of their use, biases and positions.
struct StripLayer::PackedBlock {
  Lanes *weight, *bias, *position;

  PackedBlock(const Layout& layout, Lanes* memory)
      : weight(memory), bias(weight + layout.weights), position(bias + layout.biases) {}
};

StripLayer::StripLayer(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& position, bool row,
                       bool backward)
    : weight_(checked_weight(weight)), row_(row), backward_(backward), bias_map_(bias && bias->dim() == 3) {
  if (bias && bias_map_) bias_ = checked_pixels_first(*bias, "bias");
  if (bias && !bias_map_) bias_ = checked(*bias, "bias", {weight.size(0), weight.size(2)});
  if (position) position_ = checked_pixels_first(*position, "position");
}

void StripLayer::pack(at::IntArrayRef shape) {
  const Layout layout(*this, shape);
  const int64_t blocks = divide_up(layout.channels, LANES);
  shape_ = shape.vec();
  packed_ = at::empty({blocks, layout.packed(), LANES}, weight_.options());
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Workspace workspace(layout.weights);
    Lanes* weight = workspace.take(layout.weights);
    for (const auto block : irange(begin, end)) {
      pack_block(layout, block * LANES, weight, {layout, as_lanes(packed_) + block * layout.packed()});
    }
  });
}

// Fill `packed` for the block of channels from `first` on; `weight` is scratch memory for its weights.
void StripLayer::pack_block(const Layout& layout, int64_t first, Lanes* weight, const PackedBlock& packed) const {
  const int64_t patches = weight_.size(0), channels = layout.channels, count = lanes_left(channels, first);
  load_weight(weight_, first, weight);
  arrange(weight, weight_.size(1), layout.tokens, backward_, packed.weight);
  if (position_.defined()) {
    stage_pixels(data(position_) + first, 1, layout.pixels, channels, count, packed.position, 0, 1, identity);
  }
  std::fill(packed.bias, packed.bias + layout.biases, Lanes{});
  if (bias_map_) {
    stage_pixels(data(bias_) + first, layout.height, layout.width, channels, count, packed.bias,
                 row_ ? 1 : layout.all_lines, row_ ? layout.all_lines : 1, identity);
  } else if (bias_.defined()) {
    const float* rows[LANES];
    for (const auto lane : irange(LANES)) rows[lane] = data(bias_) + (first + lane) % patches * layout.tokens;
    gather(rows, layout.tokens, packed.bias);
  }
}

void StripLayer::check_fits(const Tensor& x) const { Layout{*this, x.sizes().slice(1)}; }

Tensor StripLayer::run(const Tensor& x) const {
  const int64_t images = x.size(0), strip_width = weight_.size(1);
  const Layout layout(*this, x.sizes().slice(1));
  const bool ready = x.sizes().slice(1) == at::IntArrayRef(shape_);
  const Tensor out = empty_map(x);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_blocks(layout.channels, images, [&](int64_t begin, int64_t end) {
      const int64_t staged = layout.pitch * layout.tokens, own = ready ? 0 : layout.packed() + layout.weights;
      Workspace workspace(staged + layout.whole + own);
      Lanes *buffer = workspace.take_zeros(staged), *sums = workspace.take(layout.whole), *memory = workspace.take(own);
      for (const auto task : irange(begin, end)) {
        const int64_t first = task / images * LANES, image = task % images, count = lanes_left(layout.channels, first);
        const PackedBlock packed(layout, ready ? as_lanes(packed_) + first / LANES * layout.packed() : memory);
        if (!ready && (task == begin || image == 0)) pack_block(layout, first, memory + layout.packed(), packed);
        const int64_t offset = image * layout.pixels * layout.channels + first;
        const auto stage_image = [&](auto function) {
          stage_pixels(data<T>(x) + offset, layout.height, layout.width, layout.channels, count, buffer + layout.pad,
                       row_ ? 1 : layout.pitch, row_ ? layout.pitch : 1, function);
        };
        if (position_.defined()) {
          stage_image([&](Lanes v, int64_t pixel) { return v + packed.position[pixel]; });
        } else {
          stage_image(identity);
        }
        const Target<T> to{mutable_data<T>(out) + offset, layout.line * layout.channels, layout.token * layout.channels,
                           count};
        const Start start{packed.bias, bias_map_ ? 1 : 0, bias_map_ ? layout.all_lines : 1};
        multiply_image(buffer, layout.pitch, packed.weight, strip_width, layout, start, sums, to);
      }
    });
  });
  return out;
}

namespace {

Tensor strip_layer(const Tensor& x, const Tensor& weight, const Tensor& bias, bool row,
                   const OptionalTensor& position) {
  const BelowAutograd guard;
  check_map(x, "x");
  const StripLayer layer(weight, bias, position, row);
  layer.check_fits(x);
  return layer.run(in_channels_last(x));
}

// Products of T x U tokens of the gradient and the input, summed over the lines of an image.
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
  const auto run = [&](auto T, int64_t t) {
    for_pieces(shape.tokens, TOKENS, [&](int64_t begin, int64_t end) {
      with_tile(end - begin, [&](auto U) {
        correlate<T, U>(grad + t, x + begin, shape.lines, shape.tokens, out + t * shape.tokens + begin);
      });
    });
  };
  int64_t t = 0;
  for (; t + LINES <= shape.tokens; t += LINES) run(std::integral_constant<int, LINES>(), t);
  for (; t < shape.tokens; ++t) run(std::integral_constant<int, 1>(), t);
}

// Gradient of the weights (G, strip_width, L, L), for maps of T; a task is a block of channels and a line of the strip.
template <typename T>
Tensor weight_grad(const Tensor& grad, const Tensor& x, int64_t patches, int64_t strip_width, bool row,
                   const OptionalTensor& position) {
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Lines shape(x.size(2), x.size(3), row);
  const int64_t tokens = shape.tokens, square = tokens * tokens, pad = strip_width / 2;
  const Tensor positions = position ? checked_pixels_first(*position, "position") : Tensor();
  const Tensor out = at::empty({channels, strip_width, tokens, tokens}, at::kFloat);
  at::parallel_for(0, divide_up(channels, LANES) * strip_width, 1, [&](int64_t begin, int64_t end) {
    const int64_t padded = (shape.lines + 2 * pad) * tokens;
    Workspace workspace(padded + 2 * pixels + square);
    Lanes *staged = workspace.take_zeros(padded), *staged_grad = workspace.take(pixels), *sum = workspace.take(square);
    Lanes* position_lanes = workspace.take_zeros(pixels);
    for (const auto task : irange(begin, end)) {
      const int64_t first = task / strip_width * LANES, k = task % strip_width, count = lanes_left(channels, first);
      const int64_t to_line = row ? tokens : 1, to_token = row ? 1 : tokens;
      if (position) {
        stage_pixels(data(positions) + first, 1, pixels, channels, count, position_lanes, 0, 1, identity);
      }
      std::fill(sum, sum + square, Lanes{});
      for (const auto image : irange(images)) {
        const int64_t offset = image * pixels * channels + first;
        stage_pixels(data<T>(x) + offset, x.size(2), x.size(3), channels, count, staged + pad * tokens, to_line,
                     to_token, [&](Lanes v, int64_t pixel) { return v + position_lanes[pixel]; });
        stage_pixels(data<T>(grad) + offset, x.size(2), x.size(3), channels, count, staged_grad, to_line, to_token,
                     identity);
        correlate_image(staged_grad, staged + k * tokens, shape, sum);
      }
      scatter(sum, square, mutable_data(out) + (first * strip_width + k) * square, strip_width * square, count);
    }
  });
  return out.view({channels / patches, patches, strip_width, tokens, tokens}).sum(0);
}

// Sums (H, W, C) over the images of a map, in float32.
Tensor sum_images(const Tensor& map) {
  const int64_t images = map.size(0), size = map.numel() / images;
  const Tensor out = at::empty({map.size(2), map.size(3), map.size(1)}, at::kFloat);
  with_type(map.scalar_type(), [&](auto type) {
    const auto* first = data<decltype(type)>(map);
    at::parallel_for(0, size, 1024, [&](int64_t begin, int64_t end) {
      float* to = mutable_data(out);
      std::copy(first + begin, first + end, to + begin);
      for (const auto image : irange(1, images)) {
        const auto* from = first + image * size;
        for (const auto i : irange(begin, end)) to[i] += from[i];
      }
    });
  });
  return out;
}

// Gradient of the bias: a map (C, H, W), or (G, L).
Tensor bias_grad(const Tensor& grad, int64_t patches, bool row, bool bias_map) {
  const Tensor map = sum_images(grad);
  if (bias_map) return map.permute({2, 0, 1});
  const Tensor tokens = map.sum(row ? 0 : 1);  // (L, C)
  return tokens.view({tokens.size(0), -1, patches}).sum(1).t();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> strip_layer_backward(const Tensor& grad_out, const Tensor& input,
                                                                const Tensor& weight, bool row, bool bias_map,
                                                                const OptionalTensor& position,
                                                                std::array<bool, 4> required) {
  const BelowAutograd guard;
  check_map(input, "x"), check_map(grad_out, "grad", input.sizes());
  TORCH_CHECK(grad_out.scalar_type() == input.scalar_type(), "grad must be ", input.scalar_type(), " like x, but is ",
              grad_out.scalar_type());
  StripLayer(weight, {}, position, row).check_fits(input);
  const Tensor x = in_channels_last(input), grad = in_channels_last(grad_out);
  const int64_t patches = weight.size(0);
  const bool position_required = position && required[3];
  Tensor grad_x, grad_weight, grad_bias, grad_position;
  if (required[0] || position_required) grad_x = StripLayer(weight, {}, {}, row, true).run(grad);
  if (required[1]) {
    grad_weight = with_type(x.scalar_type(), [&](auto type) {
      return weight_grad<decltype(type)>(grad, x, patches, weight.size(1), row, position);
    });
  }
  if (required[2]) grad_bias = bias_grad(grad, patches, row, bias_map);
  if (position_required) grad_position = sum_images(grad_x).permute({2, 0, 1});
  return {required[0] ? grad_x : Tensor(), grad_weight, grad_bias, grad_position};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("strip_layer(Tensor x, Tensor weight, Tensor bias, bool row, Tensor? position=None) -> Tensor");
  library.def(
      "strip_layer_backward(Tensor grad, Tensor x, Tensor weight, bool row, bool bias_map, Tensor? position,"
      " bool[4] required) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("strip_layer", strip_layer);
  library.impl("strip_layer_backward", strip_layer_backward);
}

}  // namespace mmstrip
