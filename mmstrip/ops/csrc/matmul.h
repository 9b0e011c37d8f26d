// Matrix products whose sums are processed while they are in registers or in the L1 cache. They also beat a library's
// products with few columns, and need no rearranged rows.
#pragma once

#include <ATen/ops/constant_pad_nd.h>

#include "parallel.h"

#ifdef MMSTRIP_BFLOAT16
#include <ATen/native/CPUBlas.h>
#endif

namespace mmstrip {

// Two adjacent inputs of an output, in bfloat16.
using Pair = int32_t;

// The type of packed weights for rows of T.
template <typename T>
using Packed = std::conditional_t<std::is_same_v<T, float>, Lanes, Pair>;

// Outputs in a block of such pairs: whole vectors, in blocks of similar size.
inline int64_t block_width(int64_t outputs) {
  constexpr int64_t most = 128;
  return divide_up(divide_up(outputs, divide_up(outputs, most)), LANES) * LANES;
}

// Weights (O, K) of a linear layer, packed for rows of a type: in float32 as blocks of LANES outputs, in each K
// vectors; in bfloat16 as blocks of block_width(O) outputs, in each K / 2 lines of pairs, as brgemm reads them.
class PackedWeight {
 public:
  const int64_t depth, outputs;

  PackedWeight(const Tensor& weight, at::ScalarType type) : depth(weight.size(1)), outputs(weight.size(0)) {
    type == at::kFloat ? pack(weight.to(type)) : pack_pairs(weight.to(type));
  }

  template <typename T>
  const Packed<T>* packed() const {
    return static_cast<const Packed<T>*>(memory_.const_data_ptr());
  }

  // Of the memory.
  int64_t vectors() const { return memory_.nbytes() / sizeof(Lanes); }

  // A copy whose inputs are scaled by `factor` (K, ).
  void scale(const float* factor, Lanes* out) const {
    const Lanes* from = packed<float>();
    for (int64_t i = 0; i < vectors(); i += depth) {
      for (const auto k : irange(depth)) *out++ = *from++ * factor[k];
    }
  }

#ifdef MMSTRIP_BFLOAT16
  void scale(const float* factor, Pair* out) const {
    const Pair* from = packed<BFloat16>();
    for (int64_t i = 0; i < vectors();) {
      for (int64_t k = 0; k < depth; k += 2) {
        const float first = factor[k], second = k + 1 < depth ? factor[k + 1] : 0.0f;
        for (int64_t at = 0; at < block_width(outputs); at += LANES, ++i, from += LANES, out += LANES) {
          store_pairs(out, first_of(from) * first, second_of(from) * second);
        }
      }
    }
  }
#endif

 private:
  void pack(const Tensor& input) {
    const Tensor weight = input.stride(1) == 1 ? input : input.contiguous();
    memory_ = at::empty({divide_up(outputs, LANES), depth, LANES}, weight.options());
    Lanes* to = as_lanes(memory_);
    gather_blocks(data(weight), weight.stride(0), depth, [=](int64_t block) { return to + block * depth; });
  }

  void pack_pairs(const Tensor& input) {
    const int64_t lines = divide_up(depth, 2), width = block_width(outputs);
    const Tensor weight = (depth % 2 ? at::constant_pad_nd(input, {0, 1}) : input).contiguous();
    memory_ = at::empty({divide_up(outputs, width), lines, width}, at::kInt);
    Pair* to = memory_.mutable_data_ptr<Pair>();
    const Tensor scratch = at::empty({divide_up(outputs, LANES), lines, LANES}, at::kFloat);
    Lanes* gathered = as_lanes(scratch);
    // Pairs are moved like float32 values.
    gather_blocks(static_cast<const float*>(weight.const_data_ptr()), lines, lines,
                  [=](int64_t block) { return gathered + block * lines; });
    at::parallel_for(0, scratch.size(0), 16, [&](int64_t begin, int64_t end) {
      for (const auto block : irange(begin, end)) {
        Pair* out = to + block * LANES / width * lines * width + block * LANES % width;
        for (const auto line : irange(lines)) {
          std::memcpy(out + line * width, gathered + block * lines + line, sizeof(Lanes));
        }
      }
    });
  }

  // Blocks of LANES rows (`count` values, `stride` apart), one row per lane; target(block) is their destination.
  template <typename Target>
  void gather_blocks(const float* from, int64_t stride, int64_t count, Target target) const {
    at::parallel_for(0, divide_up(outputs, LANES), std::max<int64_t>(1, 4096 / count), [&](int64_t begin, int64_t end) {
      for (const auto block : irange(begin, end)) {
        const float* rows[LANES];
        for (const auto lane : irange(LANES)) rows[lane] = from + std::min(block * LANES + lane, outputs - 1) * stride;
        gather(rows, count, target(block));
      }
    });
  }

  Tensor memory_;
};

// Rows of T, `stride` apart, that are multiplied with packed weights.
template <typename T>
struct Operand {
  const T* rows;
  int64_t stride;
  const Packed<T>* packed;
  int64_t depth;
};

// Rows of a tile of sums that fills the registers; it is two vectors wide.
#ifdef __AVX512F__
constexpr int TILE_ROWS = 14;
#else
constexpr int TILE_ROWS = 6;
#endif

// Sums of R rows and V blocks over all operands.
template <int R, int V, typename Finish>
__attribute__((always_inline)) inline void multiply_tile(at::ArrayRef<Operand<float>> operands, int64_t row,
                                                         int64_t block, int64_t outputs, Finish finish) {
  Lanes sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Lanes{};
  }
  for (const auto& operand : operands) {
    const int64_t stride = operand.stride, depth = operand.depth;
    const float* rows[(R + 2) / 3];  // each addresses three rows
    for (int i = 0; i < (R + 2) / 3; ++i) rows[i] = operand.rows + (row + 3 * i) * stride;
    const Lanes* weight = operand.packed + block * depth;
    for (int64_t k = 0; k < depth; ++k) {
      Lanes w[V];
      for (int v = 0; v < V; ++v) w[v] = in_register(weight[v * depth + k]);
      for (int r = 0; r < R; ++r) {
        const Lanes x = in_register(broadcast(rows[r / 3][(r % 3) * stride + k]));
        for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    const int64_t first = (block + v) * LANES, count = std::min(LANES, outputs - first);
    for (int r = 0; r < R; ++r) finish(row + r, first, sum[r][v], count);
  }
}

// Products of rows [begin, end) of the operands with their weights, or with one of `parts` parts of these, summed over
// the operands; finish(row, first output, sums, count) gets them, LANES outputs at a time.
template <typename Finish>
void multiply_rows(at::ArrayRef<Operand<float>> operands, int64_t begin, int64_t end, int64_t outputs, int64_t part,
                   int64_t parts, Finish finish) {
  const int64_t blocks = divide_up(outputs, LANES), share = divide_up(divide_up(blocks, parts), 2) * 2;
  const auto run = [&](auto V, int64_t block) {
    int64_t row = begin;
    for (; row + TILE_ROWS <= end; row += TILE_ROWS) multiply_tile<TILE_ROWS, V>(operands, row, block, outputs, finish);
    for (; row + 4 <= end; row += 4) multiply_tile<4, V>(operands, row, block, outputs, finish);
    for (; row < end; ++row) multiply_tile<1, V>(operands, row, block, outputs, finish);
  };
  int64_t block = part * share;
  const int64_t last = std::min(block + share, blocks);
  for (; block + 2 <= last; block += 2) run(std::integral_constant<int, 2>(), block);
  if (block < last) run(std::integral_constant<int, 1>(), block);
}

#ifdef MMSTRIP_BFLOAT16
// The same in bfloat16, by PyTorch's micro-kernels for AMX and AVX512-BF16, with sums in a tile in the L1 cache.
// Numbers of rows are powers of two, as each has its own kernel, generated on first use.
template <typename Finish>
void multiply_rows(at::ArrayRef<Operand<BFloat16>> operands, int64_t begin, int64_t end, int64_t outputs, int64_t part,
                   int64_t parts, Finish finish) {
  constexpr int64_t most_rows = 32;
  const int64_t width = block_width(outputs), share = divide_up(divide_up(outputs, width), parts);
  alignas(64) float sums[most_rows * 128];
  std::vector<BFloat16> even;  // rows with a zero after them, as brgemm reads pairs
  int64_t rows = most_rows;
  for (int64_t row = begin; row < end; row += rows) {
    while (rows > end - row) rows /= 2;
    for (int64_t first = part * share * width; first < std::min((part + 1) * share * width, outputs); first += width) {
      const int64_t columns = std::min(width, outputs - first);
      for (const auto& operand : operands) {
        const BFloat16* from = operand.rows + row * operand.stride;
        int64_t depth = operand.depth, stride = operand.stride;
        if (depth % 2) {
          even.assign(rows * (depth + 1), 0);
          for (const auto i : irange(rows)) std::copy_n(from + i * stride, depth, even.data() + i * (depth + 1));
          from = even.data(), stride = ++depth;
        }
        at::native::cpublas::brgemm(rows, columns, depth, stride, width, width, &operand != operands.begin(), from,
                                    reinterpret_cast<const BFloat16*>(operand.packed + first * depth / 2), sums);
      }
      for (const auto i : irange(rows)) {
        for (int64_t c = 0; c < columns; c += LANES) {
          finish(row + i, first + c, load(sums + i * width + c), std::min(LANES, columns - c));
        }
      }
    }
  }
  at::native::cpublas::brgemm_release();
}
#endif

}  // namespace mmstrip
