// The fused stage: deployed blocks without gradients. Each image runs through them on its own thread.
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/custom_class.h>

#include <condition_variable>
#include <cstring>
#include <mutex>

#include "layers.h"

namespace mmstrip {
namespace {

using Blocks = c10::List<c10::List<Tensor>>;

// Run function(step, item) for all steps of all items, on all threads. An item takes its steps in order; a free thread
// takes the next step of the next item, and only waits if that item is still at an earlier step.
template <typename Function>
void in_waves(int64_t steps, int64_t items, Function function) {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<int64_t> done(items);
  int64_t next = 0;
  bool failed = false;
  const auto work = [&] {
    std::unique_lock<std::mutex> lock(mutex);
    while (next < steps * items && !failed) {
      const int64_t step = next / items, item = next % items;
      ++next;
      changed.wait(lock, [&] { return failed || done[item] == step; });
      if (failed) return;
      lock.unlock();
      function(step, item);
      lock.lock();
      ++done[item];
      changed.notify_all();
    }
  };
  const at::ThreadLocalState state;  // such as gradient mode and memory profiling
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const at::ThreadLocalStateGuard guard(state);
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failed = true;
      changed.notify_all();
      throw;
    }
  });
}

// Counts and strides of windows along both axes.
struct Windows {
  std::vector<int64_t> counts, strides;
};

// Constants of the norms in a block.
struct Epsilons {
  double batch_norm, layer_norm, response_norm;

  explicit Epsilons(const c10::List<double>& eps) {
    TORCH_CHECK(eps.size() == 3, "eps must hold 3 values per block (BN, LayerNorm, GRN), but holds ", eps.size());
    batch_norm = eps[0], layer_norm = eps[1], response_norm = eps[2];
  }
};

// The tensors of a block, taken in order.
class Tensors {
 public:
  static constexpr size_t COUNT = 26;

  explicit Tensors(const c10::List<Tensor>& tensors) : tensors_(tensors) {
    TORCH_CHECK(tensors.size() == COUNT, "blocks must hold ", COUNT, " tensors each, but one holds ", tensors.size());
  }

  // The next one, dense, in float32 and with these sizes.
  Tensor take(const char* name, at::IntArrayRef sizes) { return checked(tensors_.get(next_++), name, sizes); }

 private:
  const c10::List<Tensor>& tensors_;
  size_t next_ = 0;
};

// A shift (C, ) as BN.
BatchNorm shift_only(const Tensor& shift) {
  const Tensor zeros = at::zeros_like(shift), ones = at::ones_like(shift);
  return {at::stack({zeros, ones, ones, shift}), false};
}

// A deployed StripMLPBlock (mmstrip/models/strip_mlp.py): all BN but the first are folded, position embeddings are part
// of the biases of the strip layers, and CGSMM's last fusion is part of the block's.
class Block {
 public:
  Block(const c10::List<Tensor>& list, const Epsilons& eps, at::ScalarType type) {
    Tensors tensors(list);
    const int64_t channels = channels_ = list.get(0).numel(), half = channels / 2;
    TORCH_CHECK(channels > 0 && channels % 2 == 0, "bn_weight must have an even length, but has length ", channels);
    const auto vector = [&](const char* name, int64_t size) { return tensors.take(name, {size}); };

    const Tensor bn_weight = vector("bn_weight", channels), bn_bias = vector("bn_bias", channels);
    const Tensor bn_mean = vector("bn_mean", channels), bn_variance = vector("bn_variance", channels);
    norm_ = batch_norm({bn_weight, bn_bias, bn_mean, bn_variance, false, 0.0, eps.batch_norm}, channels);
    depthwise_.emplace(tensors.take("depthwise", {channels, 1, 3, 3}));

    const Tensor project = tensors.take("project", {channels, channels, 1, 1});
    project_.emplace(project, channels, type, shift_only(vector("project_bias", channels)), 2);

    const Tensor row = tensors.take("row", {ANY, ANY, ANY, ANY});
    const Tensor row_bias = tensors.take("row_bias", {half, ANY, row.size(2)});
    extent_ = row_bias.sizes().slice(1).vec();
    row_.emplace(row, row_bias, OptionalTensor(), true).pack(row_bias.sizes());
    const Tensor fuse_row = tensors.take("fuse_row", {half, 2 * half, 1, 1});
    fuse_row_.emplace(fuse_row, halves(2), type, shift_only(vector("fuse_row_bias", half)));
    const Tensor column = tensors.take("column", {ANY, ANY, extent_[0], extent_[0]});
    const Tensor column_bias = tensors.take("column_bias", row_bias.sizes());
    column_.emplace(column, column_bias, OptionalTensor(), false).pack(column_bias.sizes());

    const Tensor tall = tensors.take("tall", {half, 1, 7, 3}), wide = tensors.take("wide", {half, 1, 3, 7});
    const Tensor narrow = tensors.take("narrow", {ANY, half, 1, 1});
    const Tensor narrow_bias = vector("narrow_bias", narrow.size(0));
    const Tensor broad = tensors.take("broad", {3 * half, narrow.size(0), 1, 1});
    local_.emplace(tall, wide, narrow, narrow_bias, broad, vector("broad_bias", 3 * half));
    fuse_.emplace(tensors.take("fuse", {channels, 3 * half, 1, 1}), halves(3), type);

    channel_depthwise_.emplace(tensors.take("channel_depthwise", {channels, 1, 7, 7}));
    const Tensor expand = tensors.take("expand", {ANY, channels});
    const int64_t hidden = expand.size(0);
    TORCH_CHECK(hidden > 0, "expand must have at least one output, but has shape ", expand.sizes());
    const Tensor expand_bias = vector("expand_bias", hidden), gamma = vector("gamma", hidden);
    const Tensor reduce = tensors.take("reduce", {channels, hidden});
    channel_mlp_.emplace(type, LayerNorm{{}, {}, eps.layer_norm}, expand, expand_bias, gamma, OptionalTensor(),
                         eps.response_norm, reduce, vector("reduce_bias", channels));
  }

  int64_t channels() const { return channels_; }

  // From x (N, C, H, W) into `out`, which may be x.
  void run(const Tensor& x, const Windows& windows, const Tensor& out) const {
    const auto parts = project_->run({depthwise(x, *depthwise_, &norm_)});
    fuse_->run({parts[0], mix(parts[0], windows), local_->run(parts[1]).out}, x, out);
    channel_mlp_->run(depthwise(out, *channel_depthwise_), out, out);
  }

 private:
  std::vector<int64_t> halves(size_t count) const { return std::vector<int64_t>(count, channels_ / 2); }

  // CGSMM without its last fusion.
  Tensor mix(const Tensor& u, const Windows& windows) const {
    if (windows.counts[0] == 1 && windows.counts[1] == 1) return mix_window(u);
    const Tensor mixed = mix_window(split_windows(u, extent_, windows.counts, windows.strides, false));
    return merge_windows(mixed, u.sizes().slice(2), windows.counts, windows.strides, true);
  }

  Tensor mix_window(const Tensor& u) const { return column_->run(fuse_row_->run({row_->run(u), u})[0]); }

  int64_t channels_;
  std::vector<int64_t> extent_;
  BatchNorm norm_;
  std::optional<PackedKernels> depthwise_, channel_depthwise_;
  std::optional<PointwiseNormGELU> project_, fuse_row_;
  std::optional<StripLayer> row_, column_;
  std::optional<LocalStrips> local_;
  std::optional<Pointwise> fuse_;
  std::optional<ChannelMLP> channel_mlp_;
};

// A tensor and its state, to detect changes. It is kept alive, so that its memory is not reused.
class Snapshot {
 public:
  explicit Snapshot(const Tensor& tensor)
      : tensor_(tensor), data_(tensor.const_data_ptr()), version_(version(tensor)), geometry_(geometry(tensor)) {
    for (const auto i : irange(SAMPLES)) {
      int64_t index = i * (tensor.numel() - 1) / (SAMPLES - 1);
      for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
        offsets_[i] += index % tensor.size(dim) * tensor.stride(dim);
        index /= tensor.size(dim);
      }
      samples_[i] = bits(i);
    }
  }

  bool is_current(const Tensor& tensor) const {
    if (!tensor.is_same(tensor_) || tensor.const_data_ptr() != data_) return false;
    if (version(tensor) != version_ || geometry(tensor) != geometry_) return false;
    for (const auto i : irange(SAMPLES)) {
      if (samples_[i] != bits(i)) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t SAMPLES = 9;

  static int64_t version(const Tensor& tensor) { return tensor.is_inference() ? -1 : tensor._version(); }

  // A hash of sizes and strides, which is faster to compare than lists.
  static uint64_t geometry(const Tensor& tensor) {
    uint64_t hash = tensor.dim();
    for (const auto numbers : {tensor.sizes(), tensor.strides()}) {
      for (const uint64_t number : numbers) hash = hash * 1099511628211u + number;
    }
    return hash;
  }

  int32_t bits(int64_t i) const {
    int32_t bits = 0;
    const size_t size = tensor_.element_size();
    std::memcpy(&bits, static_cast<const char*>(data_) + offsets_[i] * size, size);
    return bits;
  }

  Tensor tensor_;
  const void* data_;
  int64_t version_;
  uint64_t geometry_;
  int64_t offsets_[SAMPLES] = {};
  int32_t samples_[SAMPLES];
};

// Consecutive blocks with packed weights. The tensors of a block are, in this order:
//   bn_weight, bn_bias, bn_mean, bn_variance, depthwise            BN, GELU and depthwise 3x3
//   project, project_bias                                          1x1 and GELU, two chunks
//   row, row_bias (map), fuse_row, fuse_row_bias, column, column_bias (map)
//   tall, wide, narrow, narrow_bias, broad, broad_bias
//   fuse                                                           of both mixed maps and the local one, (C, 3 C / 2,
//   1, 1) channel_depthwise, expand, expand_bias, gamma, reduce, reduce_bias
class Stage : public torch::CustomClassHolder {
 public:
  // `eps` holds those of BN, LayerNorm and GRN for each block; `type` is that of the maps.
  Stage(const Blocks& blocks, const c10::List<c10::List<double>>& eps, at::ScalarType type) : type_(type) {
    const BelowAutograd guard;
    TORCH_CHECK(type == at::kFloat || (takes_bfloat16() && type == at::kBFloat16), "type must be float32",
                takes_bfloat16() ? " or bfloat16" : "", ", but is ", type);
    TORCH_CHECK(blocks.size() > 0, "blocks must hold at least one block");
    TORCH_CHECK(eps.size() == blocks.size(), "eps must have one entry per block, ", blocks.size(), ", but has ",
                eps.size());
    for (const auto i : irange(blocks.size())) {
      const c10::List<Tensor> tensors = blocks.get(i);
      blocks_.emplace_back(tensors, Epsilons(eps.get(i)), type);
      TORCH_CHECK(blocks_[i].channels() == blocks_[0].channels(), "blocks must all have one width");
      for (const auto& tensor : tensors) snapshots_.emplace_back(tensor);
    }
  }

  // Run (N, C, H, W) in `counts` windows along both axes, `strides` apart.
  Tensor run(const Tensor& input, std::vector<int64_t> counts, std::vector<int64_t> strides) const {
    TORCH_CHECK(!at::GradMode::is_enabled() || !input.requires_grad(), "x must not require a gradient");
    TORCH_CHECK(counts.size() == 2 && strides.size() == 2, "counts and strides must hold two numbers each");
    const BelowAutograd guard;
    check_map(input, "x", {ANY, blocks_[0].channels(), ANY, ANY});
    TORCH_CHECK(input.scalar_type() == type_, "x must be ", type_, ", like the packed stage, but is ",
                input.scalar_type());
    const Tensor x = in_channels_last(input), out = empty_map(x);
    const Windows windows{std::move(counts), std::move(strides)};
    const Groups groups(x.size(0), x.size(2) * x.size(3), true);
    const auto run_block = [&](int64_t block, const Tensor& x, const Tensor& out) {
      blocks_[block].run(block == 0 ? x : out, windows, out);
    };
    if (groups.side_by_side) {
      in_waves(blocks_.size(), groups.count, [&](int64_t block, int64_t group) {
        const int64_t first = group * groups.size, images = std::min(groups.size, x.size(0) - first);
        run_block(block, x.narrow(0, first, images), out.narrow(0, first, images));
      });
    } else {
      for (const auto block : irange(blocks_.size())) run_block(block, x, out);
    }
    return out;
  }

  // Whether the stage was packed from these very tensors and none has changed. Writes in inference mode and to `.data`
  // do not increase the version, so a few values of each tensor are compared too.
  bool is_current(const Blocks& blocks) const {
    auto snapshot = snapshots_.begin();
    if (blocks.size() * Tensors::COUNT != snapshots_.size()) return false;
    for (const c10::List<Tensor>& tensors : blocks) {
      if (tensors.size() != Tensors::COUNT) return false;
      for (const Tensor& tensor : tensors) {
        if (!tensor.defined() || !(snapshot++)->is_current(tensor)) return false;
      }
    }
    return true;
  }

 private:
  const at::ScalarType type_;
  std::deque<Block> blocks_;
  std::vector<Snapshot> snapshots_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.class_<Stage>("Stage")
      .def(torch::init<const Blocks&, const c10::List<c10::List<double>>&, at::ScalarType>())
      .def("run", &Stage::run)
      .def("is_current", &Stage::is_current);
}

}  // namespace mmstrip
