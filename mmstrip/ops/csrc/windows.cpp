// Overlapping windows of a map; see mmstrip/models/windows.py for the layout.
#include <torch/library.h>

#include <cstring>

#include "layers.h"

namespace mmstrip {
namespace {

// Windows along an axis: `stride` apart, the last one moved back to end with the map.
struct Axis {
  struct Cover {
    int64_t first, last;  // windows that contain a token
  };

  int64_t length, extent, count, stride;
  std::vector<int64_t> starts;
  std::vector<Cover> covers;

  Axis(int64_t length, int64_t extent, int64_t count, int64_t stride)
      : length(length), extent(extent), count(count), stride(stride) {
    TORCH_CHECK(extent >= 1 && extent <= length, "extent must be from 1 to the map's ", length, ", but is ", extent);
    // The published rule rounds half to even: a map may have one window more than tokens.
    TORCH_CHECK(count >= 1 && count - 1 <= length, "counts must be at least 1 and at most 1 more than the map's ",
                length, " tokens, but is ", count);
    const int64_t rest = length - extent;
    const bool reaches = rest == 0 || (stride > 0 && stride <= extent && count - 1 >= divide_up(rest, stride));
    TORCH_CHECK(reaches && stride >= 0 && (stride <= extent || count == 1),
                "counts and strides must be such that windows of ", extent, " tokens cover a map of ", length,
                ", but are ", count, " and ", stride);
  }

  void place_windows() {
    covers.resize(length, {-1, -1});
    for (const auto window : irange(count)) {
      starts.push_back(std::min(window * stride, length - extent));
      for (const auto token : irange(starts.back(), starts.back() + extent)) {
        if (covers[token].first < 0) covers[token].first = window;
        covers[token].last = window;
      }
    }
  }

  // A window's weight in the mean of a token's first and last window, which may be the same.
  float share(int64_t window, int64_t token) const {
    return 0.5f * (covers[token].first == window) + 0.5f * (covers[token].last == window);
  }
};

Axis axis(at::IntArrayRef size, at::IntArrayRef extent, at::IntArrayRef counts, at::IntArrayRef strides, size_t i) {
  const auto check = [](at::IntArrayRef pair, const char* name) {
    TORCH_CHECK(pair.size() == 2, name, " must hold two numbers, but is ", pair);
  };
  check(size, "size"), check(extent, "extent"), check(counts, "counts"), check(strides, "strides");
  return Axis(size[i], extent[i], counts[i], strides[i]);
}

struct Layout {
  Axis rows, columns;

  Layout(at::IntArrayRef size, at::IntArrayRef extent, at::IntArrayRef counts, at::IntArrayRef strides)
      : rows(axis(size, extent, counts, strides, 0)), columns(axis(size, extent, counts, strides, 1)) {
    rows.place_windows(), columns.place_windows();
  }

  // Position in pixels of a map's pixel in one of its windows, which are ordered image by image, row by row.
  int64_t place(int64_t image, int64_t row_window, int64_t column_window, int64_t h, int64_t w) const {
    const int64_t window = (image * rows.count + row_window) * columns.count + column_window;
    return (window * rows.extent + h - rows.starts[row_window]) * columns.extent + w - columns.starts[column_window];
  }
};

}  // namespace

Tensor split_windows(const Tensor& input, at::IntArrayRef extent, at::IntArrayRef counts, at::IntArrayRef strides,
                     bool mean) {
  const BelowAutograd guard;
  check_map(input, "x");
  const int64_t images = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  const Layout layout({height, width}, extent, counts, strides);
  const Tensor x = in_channels_last(input);
  const Axis &rows = layout.rows, &columns = layout.columns;
  const Tensor out =
      empty_map({images * rows.count * columns.count, channels, rows.extent, columns.extent}, x.options());
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    at::parallel_for(0, images * rows.count * rows.extent, 1, [&](int64_t begin, int64_t end) {
      for (const auto line : irange(begin, end)) {
        const int64_t window = line / rows.extent, image = window / rows.count, row_window = window % rows.count;
        const int64_t h = rows.starts[row_window] + line % rows.extent;
        for (const auto column_window : irange(columns.count)) {
          const int64_t w = columns.starts[column_window];
          const T* source = from + ((image * height + h) * width + w) * channels;
          T* target = to + layout.place(image, row_window, column_window, h, w) * channels;
          if (!mean) {
            std::memcpy(target, source, columns.extent * channels * sizeof(T));
            continue;
          }
          for (const auto column : irange(columns.extent)) {
            const float share = rows.share(row_window, h) * columns.share(column_window, w + column);
            for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
              store(target + column * channels + c, load(source + column * channels + c, lanes) * share, lanes);
            });
          }
        }
      }
    });
  });
  return out;
}

Tensor merge_windows(const Tensor& input, at::IntArrayRef size, at::IntArrayRef counts, at::IntArrayRef strides,
                     bool mean) {
  const BelowAutograd guard;
  check_map(input, "x");
  // Bounds the number of windows by the input, and each axis by what the windows cover.
  const bool whole = counts.size() == 2 && counts[0] >= 1 && counts[1] >= 1 && input.size(0) % counts[0] == 0 &&
                     input.size(0) / counts[0] % counts[1] == 0;
  TORCH_CHECK(whole, "counts must be two numbers whose product divides the number of windows in x, but are ", counts,
              ", and x has shape ", input.sizes());
  const Layout layout(size, input.sizes().slice(2), counts, strides);
  const Axis &rows = layout.rows, &columns = layout.columns;
  const int64_t channels = input.size(1), height = rows.length, width = columns.length;
  const int64_t images = input.size(0) / rows.count / columns.count;
  const Tensor x = in_channels_last(input);
  const Tensor out = empty_map({images, channels, height, width}, x.options());
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    struct Part {
      const T* from;
      float share;
    };
    at::parallel_for(0, images * height, 1, [&](int64_t begin, int64_t end) {
      std::vector<Part> parts;  // of a pixel
      for (const auto line : irange(begin, end)) {
        const int64_t image = line / height, h = line % height;
        const auto row = rows.covers[h];
        for (const auto w : irange(width)) {
          const auto column = columns.covers[w];
          parts.clear();
          for (const auto row_window : irange(row.first, row.last + 1)) {
            for (const auto column_window : irange(column.first, column.last + 1)) {
              const float share = mean ? rows.share(row_window, h) * columns.share(column_window, w) : 1.0f;
              parts.push_back({from + layout.place(image, row_window, column_window, h, w) * channels, share});
            }
          }
          T* target = to + (line * width + w) * channels;
          for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            Lanes sum{};
            for (const auto& part : parts) sum += load(part.from + c, lanes) * part.share;
            store(target + c, sum, lanes);
          });
        }
      }
    });
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.def("split_windows(Tensor x, int[2] extent, int[2] counts, int[2] strides, bool mean=False) -> Tensor");
  library.def("merge_windows(Tensor x, int[2] size, int[2] counts, int[2] strides, bool mean=True) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmstrip, CPU, library) {
  library.impl("split_windows", split_windows);
  library.impl("merge_windows", merge_windows);
}

}  // namespace mmstrip
