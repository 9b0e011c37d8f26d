// Sharing work among threads, and scratch memory of threads.
#pragma once

#include <ATen/Parallel.h>

#include <memory>

#include "simd.h"
#include "tensor.h"

namespace mmstrip {

// A tensor's memory as vectors.
inline Lanes* as_lanes(const Tensor& tensor) { return reinterpret_cast<Lanes*>(mutable_data(tensor)); }

// Scratch memory, handed out in pieces. Each thread caches up to LIMIT vectors between calls, as fresh memory costs a
// fault per page; more is freed after use.
class Workspace {
 public:
  explicit Workspace(int64_t size) : cached_(size <= LIMIT) {
    if (cached_) memory_ = std::move(cache());
    if (memory_.size < size) memory_ = {std::unique_ptr<Lanes[]>(new Lanes[size]), size};
    next_ = memory_.data.get();
  }

  ~Workspace() {
    if (cached_) cache() = std::move(memory_);
  }

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  Lanes* take(int64_t size) {
    next_ += size;
    return next_ - size;
  }

  Lanes* take_zeros(int64_t size) {
    Lanes* piece = take(size);
    std::fill(piece, piece + size, Lanes{});
    return piece;
  }

 private:
  static constexpr int64_t LIMIT = (8 << 20) / sizeof(Lanes);

  struct Memory {
    std::unique_ptr<Lanes[]> data;
    int64_t size = 0;
  };

  static Memory& cache() {
    thread_local Memory memory;
    return memory;
  }

  const bool cached_;
  Memory memory_;
  Lanes* next_;
};

// Tasks are the images of all blocks of LANES channels, block by block; function(begin, end) runs some of them.
template <typename Function>
inline void for_blocks(int64_t channels, int64_t images, Function function) {
  at::parallel_for(0, divide_up(channels, LANES) * images, 1, function);
}

// Sums over pixels are computed slice by slice, so their order does not depend on the number of threads.
constexpr int64_t SLICE = 128;

// Rows of images with `pixels` pixels each, cut into slices within an image.
struct Slices {
  int64_t images, pixels, channels, per_image, count;

  Slices(int64_t images, int64_t pixels, int64_t channels)
      : images(images),
        pixels(pixels),
        channels(channels),
        per_image(divide_up(pixels, SLICE)),
        count(images * per_image) {}

  // Space for sums of all slices, (images, slices, channels).
  Tensor sums() const { return at::zeros({images, per_image, channels}, at::kFloat); }

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

// Rows per block: enough for an efficient matrix product, and few enough for the L2 cache.
constexpr int64_t BLOCK_ROWS = 196;

inline int64_t free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// The rows of a product in blocks and, if there are too few rows for all threads, its columns in parts.
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

// Images run through several steps group by group, so that intermediate results stay in the cache: one group per thread
// if they divide evenly, else each group on all threads.
struct Groups {
  int64_t images, pixels, size, count;
  bool side_by_side;

  // With `waves`, a free thread may take another group's next step.
  Groups(int64_t images, int64_t pixels, bool waves = false) : images(images), pixels(pixels) {
    const int64_t threads = free_threads();
    split(BLOCK_ROWS);
    side_by_side = threads > 1 && (count % threads == 0 || count >= (waves ? 1 : 4) * threads);
    if (!side_by_side) split(BLOCK_ROWS * threads);
  }

  // Memory (threads, count).
  Tensor memory(int64_t count, at::ScalarType type) const {
    return in_large_pages(at::empty({side_by_side ? at::get_num_threads() : 1, count}, type));
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

// Sums (C, ) of a matrix (R, C) over its rows, in float32.
inline Tensor sum_rows(const Tensor& matrix) {
  const Tensor dense = matrix.contiguous();
  const Slices slices(1, dense.size(0), dense.size(1));
  const int64_t channels = slices.channels;
  const Tensor sums = slices.sums(), out = at::zeros({channels}, at::kFloat);
  const auto add_rows = [channels](const auto* from, int64_t first, int64_t end, float* sum) {
    for (int64_t row = first; row < end; ++row) {
      for_lanes(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        add_to(sum + c, load(from + row * channels + c, lanes), lanes);
      });
    }
  };
  with_type(dense.scalar_type(), [&](auto type) {
    const auto* from = data<decltype(type)>(dense);
    slices.for_each([&](int64_t slice, int64_t first, int64_t end) {
      add_rows(from, first, end, mutable_data(sums) + slice * channels);
    });
  });
  add_rows(data(sums), 0, slices.count, mutable_data(out));
  return out;
}

}  // namespace mmstrip
