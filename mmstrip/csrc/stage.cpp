// Blocks as a whole, without gradients: images run through them side by side, each on a thread.
#include <ATen/ThreadLocalState.h>
#include <torch/custom_class.h>

#include <atomic>
#include <functional>
#include <thread>

#include "maps.h"
#include "steps.h"

namespace mmstrip {
namespace {

using State = c10::Dict<std::string, Tensor>;

// Constants of the norms in a block: of BN, of LayerNorm and of GRN.
struct Epsilons {
  double norm, layer_norm, response;
};

// Counts and strides of windows along both axes.
struct Windows {
  std::vector<int64_t> counts, strides;
};

// A block's tensors by their names.
class Named {
 public:
  explicit Named(const State& state) : state_(state) {}

  OptionalTensor find(const std::string& name) const {
    return state_.contains(name) ? OptionalTensor(state_.at(name)) : OptionalTensor();
  }

  Tensor at(const std::string& name) const {
    TORCH_CHECK(state_.contains(name), "a block without ", name);
    return state_.at(name);
  }

  // The BN layer of that name behind what adds a bias; without such a layer the bias alone.
  BatchNorm norm(const std::string& name, double eps, const OptionalTensor& bias = {}) const {
    if (const auto weight = find(name + ".weight")) {
      return batch_norm({}, bias, {*weight, at(name + ".bias"), at(name + ".running_mean"), at(name + ".running_var"),
                                   false, 0.0, eps});
    }
    TORCH_CHECK(bias, "a block without ", name, ".weight or a bias in front");
    const Tensor zeros = at::zeros_like(*bias), ones = at::ones_like(*bias);
    return batch_norm({}, bias, {ones, zeros, zeros, ones, false, 0.0, 0.0});
  }

 private:
  const State& state_;
};

// Steps of several items, each of which takes the steps in order, on all threads: who is free takes the next step of the
// next item, so that no thread waits for another one but where an item is still at its step before. function(step, item)
template <typename Function>
void in_waves(int64_t steps, int64_t items, Function function) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::vector<std::atomic<int64_t>> done(items);
  for (auto& count : done) count = 0;
  const auto work = [&] {
    for (int64_t task; (task = next++) < steps * items;) {
      const int64_t step = task / items, item = task % items;
      while (done[item].load(std::memory_order_acquire) < step) {
        if (failed) return;
        std::this_thread::yield();
      }
      function(step, item);
      done[item].store(step + 1, std::memory_order_release);
    }
  };
  const at::ThreadLocalState state;  // that gradients are off, that memory is counted
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const at::ThreadLocalStateGuard guard(state);
    try {
      work();
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

// StripMLPBlock (mmstrip/models/strip_mlp.py) without its gradient, from its parameters and buffers and, if it adds
// positions, these: position_row and position_column, (C / 2, H, W). Deployed or not.
class Block {
 public:
  Block(const Named& named, const Epsilons& eps) {
    const int64_t channels = named.at("strip_mixing.fuse.weight").size(0);
    const std::vector<int64_t> halves{channels / 2, channels / 2};
    const auto position = named.find("position_row");
    const auto shape = (position ? *position : named.at(CGSMM + "row.bias")).sizes();
    extent_ = shape.slice(1).vec();
    const std::function<void()> steps[] = {
        [&] {
          channel_mlp_.emplace(
              LayerNorm{named.find("channel_mixing.norm.weight"), named.find("channel_mixing.norm.bias"), eps.layer_norm},
              named.at("channel_mixing.fc1.weight"), named.at("channel_mixing.fc1.bias"),
              named.at("channel_mixing.grn.gamma"), named.find("channel_mixing.grn.beta"), eps.response,
              named.at("channel_mixing.fc2.weight"), named.at("channel_mixing.fc2.bias"));
        },
        [&] {
          row_.emplace(named.at(CGSMM + "row.weight"), named.at(CGSMM + "row.bias"), position, true);
          row_->keep(shape);
        },
        [&] {
          column_.emplace(named.at(CGSMM + "column.weight"), named.at(CGSMM + "column.bias"),
                          named.find("position_column"), false);
          column_->keep(shape);
        },
        [&] {
          project_.emplace(named.at("strip_mixing.project.0.weight"), channels,
                           named.norm("strip_mixing.project.1", eps.norm, named.at("strip_mixing.project.0.bias")), 2);
        },
        [&] {
          const Tensor weight = named.at("strip_mixing.fuse.weight");
          const auto last = named.find(CGSMM + "fuse_column.weight");
          fuse_.emplace(weight, std::vector<int64_t>(last ? 2 : 3, channels / 2));
          if (last) fuse_column_.emplace(*last, halves);
        },
        [&] {
          fuse_row_.emplace(named.at(CGSMM + "fuse_row.weight"), halves,
                            named.norm(CGSMM + "norm", eps.norm, named.find(CGSMM + "fuse_row.bias")));
        },
        [&] {
          lsmm_.emplace(named.at(LSMM + "tall.weight"), named.at(LSMM + "wide.weight"),
                        named.at(LSMM + "reweight.0.weight"), named.at(LSMM + "reweight.0.bias"),
                        named.at(LSMM + "reweight.2.weight"), named.at(LSMM + "reweight.2.bias"));
        },
        [&] {
          norm_ = named.norm("strip_mixing.depthwise.0", eps.norm);
          depthwise_.emplace(named.at("strip_mixing.depthwise.2.weight"));
          channel_depthwise_.emplace(named.at("channel_mixing.depthwise.weight"));
        },
    };
    in_waves(1, std::size(steps), [&](int64_t, int64_t step) { steps[step](); });
  }

  // Of (N, C, H, W) into `out`, which may be x.
  void run(const Tensor& x, const Windows& windows, const Tensor& out) const {
    const auto parts = project_->run({depthwise(x, *depthwise_, &norm_)});
    const Tensor &u = parts[0], mixed = mix(u, windows), local = lsmm_->run(parts[1]).out;
    if (fuse_column_) {
      fuse_->run({fuse_column_->run({u, mixed}), local}, x, out);
    } else {
      fuse_->run({u, mixed, local}, x, out);
    }
    channel_mlp_->run(depthwise(out, *channel_depthwise_), out, out);
  }

 private:
  inline static const std::string CGSMM = "strip_mixing.branches.cgsmm.", LSMM = "strip_mixing.branches.lsmm.";

  // CGSMM but for its last fusion, which in the deploy form is in that of the block.
  Tensor mix(const Tensor& u, const Windows& windows) const {
    if (windows.counts[0] * windows.counts[1] == 1) return mix_window(u);
    const Tensor mixed = mix_window(split_windows(u, extent_, windows.counts, windows.strides, false));
    return merge_windows(mixed, u.sizes().slice(2), windows.counts, windows.strides, true);
  }

  Tensor mix_window(const Tensor& u) const { return column_->run(fuse_row_->run({row_->run(u), u})[0]); }

  std::vector<int64_t> extent_;
  BatchNorm norm_;
  std::optional<Taps> depthwise_, channel_depthwise_;
  std::optional<PointwiseNormGELU> project_, fuse_row_;
  std::optional<StripLayer> row_, column_;
  std::optional<LocalStrips> lsmm_;
  std::optional<Pointwise> fuse_column_, fuse_;
  std::optional<ChannelMLP> channel_mlp_;
};

// Blocks that follow each other.
class Stage : public torch::CustomClassHolder {
 public:
  Stage(const c10::List<State>& blocks, double norm_eps, double layer_norm_eps, double response_eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (const State& state : blocks) blocks_.emplace_back(Named(state), Epsilons{norm_eps, layer_norm_eps, response_eps});
  }

  // Of (N, C, H, W), cut into so many windows along both axes, with these strides.
  Tensor run(const Tensor& any, std::vector<int64_t> counts, std::vector<int64_t> strides) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    TORCH_CHECK(counts.size() == 2 && strides.size() == 2, "counts and strides of windows along two axes");
    const Tensor x = channels_last(any), out = empty_map(x);
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

 private:
  std::deque<Block> blocks_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmstrip, library) {
  library.class_<Stage>("Stage")
      .def(torch::init<c10::List<State>, double, double, double>())
      .def("run", &Stage::run);
}

}  // namespace mmstrip
