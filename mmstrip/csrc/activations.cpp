// GELU with what precedes or follows it, in one pass over memory.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "lanes.h"

namespace mmstrip {
namespace {

// Sums over the pixels of an image are taken slice by slice, so that their order does not depend on the threads.
constexpr int64_t SLICE = 128;

// Pixels x channels of images; a slice does not leave its image.
struct Slices {
  int64_t images, pixels, channels, per_image, count;

  Slices(int64_t images, int64_t pixels, int64_t channels)
      : images(images),
        pixels(pixels),
        channels(channels),
        per_image((pixels + SLICE - 1) / SLICE),
        count(images * per_image) {}

  // Space for sums of all slices, (images, slices, channels).
  at::Tensor sums(const at::TensorOptions& options) const { return at::zeros({images, per_image, channels}, options); }

  // function(slice, first pixel, end) for all slices, pixels counted over all images.
  template <typename Function>
  void for_each(Function function) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (const auto slice : irange(begin, end)) {
        const int64_t image = slice / per_image, first = slice % per_image * SLICE;
        function(slice, image * pixels + first, image * pixels + std::min(first + SLICE, pixels));
      }
    });
  }
};

Slices slices_of_map(const at::Tensor& x) {
  return Slices(1, x.size(0) * x.size(2) * x.size(3), x.size(1));
}

Slices slices_of_images(const at::Tensor& x) {
  return Slices(x.size(0), x.size(1) * x.size(2), x.size(3));
}

template <typename Count>
__attribute__((always_inline)) inline void add_to(float* sum, Lanes value, Count lanes) {
  store(sum, load(sum, lanes) + value, lanes);
}

// gelu(x * scale + shift) of (N, C, H, W), its channels in equal parts.
std::vector<at::Tensor> affine_gelu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, int64_t parts) {
  const int64_t channels = x.size(1), width = channels / parts, pixels = x.size(0) * x.size(2) * x.size(3);
  TORCH_CHECK(scale.numel() == channels && shift.numel() == channels, "scale does not fit a map of ", channels, " channels");
  const auto options = x.options().memory_format(at::MemoryFormat::ChannelsLast);
  std::vector<at::Tensor> out(parts);
  for (auto& part : out) part = at::empty({x.size(0), width, x.size(2), x.size(3)}, options);
  const float* a = scale.const_data_ptr<float>();
  const float* b = shift.const_data_ptr<float>();
  at::parallel_for(0, pixels, 64, [&](int64_t begin, int64_t end) {
    for (const auto part : irange(parts)) {
      const float* from = x.const_data_ptr<float>() + begin * channels + part * width;
      float* to = out[part].mutable_data_ptr<float>() + begin * width;
      for (int64_t pixel = begin; pixel < end; ++pixel, from += channels, to += width) {
        for_lanes(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const int64_t channel = part * width + c;
          store(to + c, gelu(load(from + c, lanes) * load(a + channel, lanes) + load(b + channel, lanes)), lanes);
        });
      }
    }
  });
  return out;
}

// y = gelu(x + shift) of (N, H, W, C), and the sums of its squares (N, 1, 1, C).
at::Tensor gelu_square_sum_out(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& y) {
  const Slices slices = slices_of_images(x);
  TORCH_CHECK(shift.numel() == slices.channels && x.is_contiguous(), "shift does not fit");
  const at::Tensor sums = slices.sums(x.options());
  const int64_t channels = slices.channels;
  const float* b = shift.const_data_ptr<float>();
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = sums.mutable_data_ptr<float>() + slice * channels;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const float* from = x.const_data_ptr<float>() + pixel * channels;
      float* to = y.mutable_data_ptr<float>() + pixel * channels;
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes value = gelu(load(from + c, lanes) + load(b + c, lanes));
        store(to + c, value, lanes);
        add_to(sum + c, value * value, lanes);
      });
    }
  });
  return sums.sum(1).view({x.size(0), 1, 1, channels});
}

at::Tensor gelu_square_sum_(at::Tensor& x, const at::Tensor& shift) {
  return gelu_square_sum_out(x, shift, x);
}

std::tuple<at::Tensor, at::Tensor> gelu_square_sum(const at::Tensor& x, const at::Tensor& shift) {
  const at::Tensor y = at::empty_like(x);
  return {y, gelu_square_sum_out(x, shift, y)};
}

// Of y = gelu(x + shift): y * multiplier (N, 1, 1, C), and the sums of y * grad (N, 1, 1, C).
std::tuple<at::Tensor, at::Tensor> gelu_scale(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& multiplier,
                                              const at::Tensor& grad) {
  const Slices slices = slices_of_images(x);
  const at::Tensor sums = slices.sums(x.options()), out = at::empty_like(x);
  const int64_t channels = slices.channels;
  const float* b = shift.const_data_ptr<float>();
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = sums.mutable_data_ptr<float>() + slice * channels;
    const float* factor = multiplier.const_data_ptr<float>() + slice / slices.per_image * channels;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const int64_t at = pixel * channels;
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes y = gelu(load(x.const_data_ptr<float>() + at + c, lanes) + load(b + c, lanes));
        store(out.mutable_data_ptr<float>() + at + c, y * load(factor + c, lanes), lanes);
        add_to(sum + c, y * load(grad.const_data_ptr<float>() + at + c, lanes), lanes);
      });
    }
  });
  return {out, sums.sum(1).view({x.size(0), 1, 1, channels})};
}

// Gradient of x, in place of grad: (grad * multiplier + y * slope) * gelu'(x + shift), and its sums (C, ).
at::Tensor gelu_scale_backward_(at::Tensor& grad, const at::Tensor& x, const at::Tensor& shift,
                                const at::Tensor& multiplier, const at::Tensor& slope) {
  const Slices slices = slices_of_images(x);
  const at::Tensor sums = slices.sums(x.options());
  const int64_t channels = slices.channels;
  const float* b = shift.const_data_ptr<float>();
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = sums.mutable_data_ptr<float>() + slice * channels;
    const float* factor = multiplier.const_data_ptr<float>() + slice / slices.per_image * channels;
    const float* steep = slope.const_data_ptr<float>() + slice / slices.per_image * channels;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const float* from = x.const_data_ptr<float>() + pixel * channels;
      float* to = grad.mutable_data_ptr<float>() + pixel * channels;
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes value = load(from + c, lanes) + load(b + c, lanes);
        const Lanes above = load(to + c, lanes) * load(factor + c, lanes) + gelu(value) * load(steep + c, lanes);
        const Lanes out = above * gelu_slope(value);
        store(to + c, out, lanes);
        add_to(sum + c, out, lanes);
      });
    }
  });
  return sums.flatten(0, 1).sum(0);
}

// Mean and biased variance (C, ) of (N, C, H, W): those of slices, then of their means.
std::tuple<at::Tensor, at::Tensor> channel_moments(const at::Tensor& x) {
  const Slices slices = slices_of_map(x);
  const int64_t channels = slices.channels;
  const at::Tensor sums = slices.sums(x.options())[0], squares = slices.sums(x.options())[0];
  const at::Tensor sizes = at::empty({slices.count, 1}, x.options());
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    float* sum = sums.mutable_data_ptr<float>() + slice * channels;
    float* square = squares.mutable_data_ptr<float>() + slice * channels;
    const float* from = x.const_data_ptr<float>();
    const float size = end - first;
    sizes.mutable_data_ptr<float>()[slice] = size;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        add_to(sum + c, load(from + pixel * channels + c, lanes), lanes);
      });
    }
    for (int64_t pixel = first; pixel < end; ++pixel) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const Lanes distance = load(from + pixel * channels + c, lanes) - load(sum + c, lanes) * (1 / size);
        add_to(square + c, distance * distance, lanes);
      });
    }
  });
  const at::Tensor mean = sums.sum(0) / slices.pixels;
  return {mean, (squares.sum(0) + ((sums / sizes - mean).square() * sizes).sum(0)) / slices.pixels};
}

// Gradient of z = x * scale + shift from those of the parts of gelu(z); its sums and those of it times x - mean (C, ).
std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_gelu_backward(at::TensorList grads, const at::Tensor& x,
                                                                    const at::Tensor& scale, const at::Tensor& shift,
                                                                    const at::Tensor& mean) {
  const Slices slices = slices_of_map(x);
  const int64_t channels = slices.channels, width = channels / grads.size();
  const at::Tensor out = empty_map(x), sums = slices.sums(x.options()), products = slices.sums(x.options());
  slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
    for (const auto part : irange(grads.size())) {
      const int64_t left = part * width;
      float* sum = sums.mutable_data_ptr<float>() + slice * channels + left;
      float* product = products.mutable_data_ptr<float>() + slice * channels + left;
      const float* a = scale.const_data_ptr<float>() + left;
      const float* b = shift.const_data_ptr<float>() + left;
      const float* m = mean.const_data_ptr<float>() + left;
      for (int64_t pixel = first; pixel < end; ++pixel) {
        const float* from = x.const_data_ptr<float>() + pixel * channels + left;
        const float* above = grads[part].const_data_ptr<float>() + pixel * width;
        float* to = out.mutable_data_ptr<float>() + pixel * channels + left;
        for_lanes(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const Lanes value = load(from + c, lanes);
          const Lanes grad = load(above + c, lanes) * gelu_slope(value * load(a + c, lanes) + load(b + c, lanes));
          store(to + c, grad, lanes);
          add_to(sum + c, grad, lanes);
          add_to(product + c, grad * (value - load(m + c, lanes)), lanes);
        });
      }
    }
  });
  return {out, sums.flatten(0, 1).sum(0), products.flatten(0, 1).sum(0)};
}

// y * a + x * b + c in place of y; y and x (N, C, H, W), the others (C, ).
void combine_(at::Tensor& y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
  const int64_t channels = x.size(1);
  at::parallel_for(0, x.size(0) * x.size(2) * x.size(3), 64, [&](int64_t begin, int64_t end) {
    for (const auto pixel : irange(begin, end)) {
      const float* from = x.const_data_ptr<float>() + pixel * channels;
      float* to = y.mutable_data_ptr<float>() + pixel * channels;
      for_lanes(channels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const Lanes value = load(to + i, lanes) * load(a.const_data_ptr<float>() + i, lanes) +
            load(from + i, lanes) * load(b.const_data_ptr<float>() + i, lanes);
        store(to + i, value + load(c.const_data_ptr<float>() + i, lanes), lanes);
      });
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("affine_gelu(Tensor x, Tensor scale, Tensor shift, int parts) -> Tensor[]");
  library.def("affine_gelu_backward(Tensor[] grads, Tensor x, Tensor scale, Tensor shift, Tensor mean)"
              " -> (Tensor, Tensor, Tensor)");
  library.def("channel_moments(Tensor x) -> (Tensor, Tensor)");
  library.def("combine_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor c) -> ()");
  library.def("gelu_square_sum(Tensor x, Tensor shift) -> (Tensor, Tensor)");
  library.def("gelu_square_sum_(Tensor(a!) x, Tensor shift) -> Tensor");
  library.def("gelu_scale(Tensor x, Tensor shift, Tensor multiplier, Tensor grad) -> (Tensor, Tensor)");
  library.def("gelu_scale_backward_(Tensor(a!) grad, Tensor x, Tensor shift, Tensor multiplier, Tensor slope) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("affine_gelu", affine_gelu);
  library.impl("affine_gelu_backward", affine_gelu_backward);
  library.impl("channel_moments", channel_moments);
  library.impl("combine_", combine_);
  library.impl("gelu_square_sum", gelu_square_sum);
  library.impl("gelu_square_sum_", gelu_square_sum_);
  library.impl("gelu_scale", gelu_scale);
  library.impl("gelu_scale_backward_", gelu_scale_backward_);
}

}  // namespace mmstrip
