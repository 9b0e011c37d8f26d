// Matrix products whose sums are worked on while they are still in registers. Beside that they win where a library's lose:
// with few columns, and as rows need no rearrangement.
#pragma once

#include "parallel.h"

namespace mmstrip {

// A tile of sums that fills the registers: so many rows, two vectors wide.
#ifdef __AVX512F__
constexpr int TILE_ROWS = 14;
#else
constexpr int TILE_ROWS = 6;
#endif

// Weights (O, K) of a linear layer, packed as blocks of LANES outputs, in each K vectors.
class PackedWeight {
 public:
  const int64_t depth, outputs;

  explicit PackedWeight(const Tensor& input)
      : depth(input.size(1)), outputs(input.size(0)), memory_(at::empty({blocks(), depth, LANES}, input.options())) {
    const Tensor weight = input.stride(1) == 1 ? input : input.contiguous();
    const int64_t stride = weight.stride(0);
    const float* from = data(weight);
    Lanes* to = as_lanes(memory_);
    at::parallel_for(0, blocks(), std::max<int64_t>(1, 4096 / depth), [&](int64_t begin, int64_t end) {
      for (const auto block : irange(begin, end)) {
        const float* rows[LANES];
        for (const auto lane : irange(LANES)) rows[lane] = from + std::min(block * LANES + lane, outputs - 1) * stride;
        gather(rows, depth, to + block * depth);
      }
    });
  }

  int64_t blocks() const { return divide_up(outputs, LANES); }
  const Lanes* block(int64_t index) const { return as_lanes(memory_) + index * depth; }

  int64_t size() const { return memory_.numel(); }

  // A copy whose inputs are scaled by `factor` (K, ).
  void scale(const float* factor, Lanes* out) const {
    for (const auto block : irange(blocks())) {
      const Lanes* from = this->block(block);
      for (const auto k : irange(depth)) *out++ = from[k] * factor[k];
    }
  }

 private:
  Tensor memory_;
};

// Rows of floats, `stride` apart, that are multiplied with packed weights.
struct Operand {
  const float* rows;
  int64_t stride;
  const Lanes* packed;
  int64_t depth;
};

// Sums of R rows and V blocks over all operands.
template <int R, int V, typename Finish>
__attribute__((always_inline)) inline void multiply_tile(at::ArrayRef<Operand> operands, int64_t row, int64_t block,
                                                         int64_t outputs, Finish finish) {
  Lanes sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Lanes{};
  }
  for (const auto& operand : operands) {
    const int64_t stride = operand.stride, depth = operand.depth;
    const float* rows[(R + 2) / 3];  // each reaches three rows, by addressing alone
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

// Products of rows [begin, end) of the operands with their weights, or one of so many parts of these, added up over the
// operands; finish(row, first output, sums, count) takes them, LANES outputs at a time.
template <typename Finish>
void multiply_rows(at::ArrayRef<Operand> operands, int64_t begin, int64_t end, int64_t outputs, int64_t part,
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

}  // namespace mmstrip
