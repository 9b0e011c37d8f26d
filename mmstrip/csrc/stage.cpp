// Stages of the deploy form, whole: weights are brought in order once, and images run side by side through all blocks.
#include <torch/custom_class.h>

#include <atomic>
#include <exception>
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

// Counts and strides of windows along both axes; none where the map is as large as a window.
struct Windows {
  std::vector<int64_t> counts, strides;
};

BatchNorm only_bias(const Tensor& bias) {
  const Tensor zeros = at::zeros_like(bias), ones = at::ones_like(bias);
  return {at::stack({zeros, ones, ones, bias}), false};
}

std::vector<int64_t> times(int64_t count, int64_t channels) {
  return std::vector<int64_t>(count, channels);
}

// StripMLPBlock (mmstrip/models/strip_mlp.py) in its deploy form, from its state dict.
class Block {
 public:
  Block(const State& state, const Epsilons& eps)
      : channels_(state.at("strip_mixing.fuse.weight").size(0)),
        extent_(state.at(CGSMM + "row.bias").sizes().slice(1).vec()),
        norm_(batch_norm({}, {},
                         {state.at("strip_mixing.depthwise.0.weight"), state.at("strip_mixing.depthwise.0.bias"),
                          state.at("strip_mixing.depthwise.0.running_mean"),
                          state.at("strip_mixing.depthwise.0.running_var"), false, 0.0, eps.norm})),
        depthwise_(state.at("strip_mixing.depthwise.2.weight")),
        project_(state.at("strip_mixing.project.0.weight"), channels_, only_bias(state.at("strip_mixing.project.0.bias")),
                 2),
        row_(state.at(CGSMM + "row.weight"), state.at(CGSMM + "row.bias"), {}, true),
        fuse_row_(state.at(CGSMM + "fuse_row.weight"), times(2, channels_ / 2),
                  only_bias(state.at(CGSMM + "fuse_row.bias"))),
        column_(state.at(CGSMM + "column.weight"), state.at(CGSMM + "column.bias"), {}, false),
        lsmm_(state.at(LSMM + "tall.weight"), state.at(LSMM + "wide.weight"), state.at(LSMM + "reweight.0.weight"),
              state.at(LSMM + "reweight.0.bias"), state.at(LSMM + "reweight.2.weight"),
              state.at(LSMM + "reweight.2.bias")),
        fuse_(state.at("strip_mixing.fuse.weight"), times(3, channels_ / 2)),
        channel_depthwise_(state.at("channel_mixing.depthwise.weight")),
        channel_mlp_({{}, {}, eps.layer_norm}, state.at("channel_mixing.fc1.weight"),
                     state.at("channel_mixing.fc1.bias"), state.at("channel_mixing.grn.gamma"), {}, eps.response,
                     state.at("channel_mixing.fc2.weight"), state.at("channel_mixing.fc2.bias")) {
    const auto shape = state.at(CGSMM + "row.bias").sizes();
    row_.keep(shape);
    column_.keep(shape);
  }

  // Of (N, C, H, W) into `out`, which may be x.
  void run(const Tensor& x, const Windows& windows, const Tensor& out) const {
    const auto parts = project_.run({depthwise(x, depthwise_, &norm_)});
    const Tensor& u = parts[0];
    fuse_.run({u, cgsmm(u, windows), lsmm_.run(parts[1]).out}, x, out);
    channel_mlp_.run(depthwise(out, channel_depthwise_), out, out);
  }

 private:
  inline static const std::string CGSMM = "strip_mixing.branches.cgsmm.", LSMM = "strip_mixing.branches.lsmm.";

  // CGSMM but for its last fusion, which is in that of the block.
  Tensor cgsmm(const Tensor& u, const Windows& windows) const {
    if (windows.counts.empty()) return mix_window(u);
    const Tensor mixed = mix_window(split_windows(u, extent_, windows.counts, windows.strides, false));
    return merge_windows(mixed, u.sizes().slice(2), windows.counts, windows.strides, true);
  }

  Tensor mix_window(const Tensor& u) const { return column_.run(fuse_row_.run({row_.run(u), u})[0]); }

  int64_t channels_;
  std::vector<int64_t> extent_;
  BatchNorm norm_;
  Taps depthwise_;
  PointwiseNormGELU project_;
  StripLayer row_;
  PointwiseNormGELU fuse_row_;
  StripLayer column_;
  LocalStrips lsmm_;
  Pointwise fuse_;
  Taps channel_depthwise_;
  ChannelMLP channel_mlp_;
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
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below;  // threads do not inherit it
    try {
      work();
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

class Stage : public torch::CustomClassHolder {
 public:
  Stage(const c10::List<State>& blocks, double norm_eps, double layer_norm_eps, double response_eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (const State& state : blocks) blocks_.emplace_back(state, Epsilons{norm_eps, layer_norm_eps, response_eps});
  }

  // Of (N, C, H, W); `counts` and `strides` of windows are empty where that is as large as one.
  Tensor run(const Tensor& any, std::vector<int64_t> counts, std::vector<int64_t> strides) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor x = channels_last(any), out = empty_map(x);
    const Windows windows{std::move(counts), std::move(strides)};
    const Groups groups(x.size(0), x.size(2) * x.size(3));
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
