// Tensors: checks of what an operator is given, and maps (N, C, H, W) in channels_last memory.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace mmstrip {

using at::Tensor;
using c10::irange;
using OptionalTensor = std::optional<Tensor>;

// Operators have no autograd of their own: theirs is in Python, around them.
// Within it PyTorch's operations record no graph and keep to float32, also in a backward pass under autocast.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

constexpr int64_t ANY = -1;  // a size that may be any

// Refuse a tensor that is not float32 on the CPU, or not of these sizes.
inline void check(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.defined(), name, " is missing");
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
                  !tensor.is_neg() && !tensor._is_zerotensor(),
              name, " must be a dense float32 tensor on the CPU, but is a ", tensor.toString(), " on ", tensor.device());
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (const auto i : irange(sizes.size())) fits = fits && (sizes[i] == ANY || tensor.size(i) == sizes[i]);
  if (fits) return;
  std::ostringstream allowed;
  for (const auto i : irange(sizes.size())) {
    allowed << (i ? ", " : "") << (sizes[i] == ANY ? "any" : std::to_string(sizes[i]));
  }
  TORCH_CHECK(false, name, " must be of shape [", allowed.str(), "], but is of ", tensor.sizes());
}

// The same, made contiguous: what kernels read through a pointer.
inline Tensor checked(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  check(tensor, name, sizes);
  return tensor.contiguous();
}

inline OptionalTensor checked(const OptionalTensor& tensor, const char* name, at::IntArrayRef sizes) {
  return tensor ? OptionalTensor(checked(*tensor, name, sizes)) : tensor;
}

// A map (N, C, H, W) with at least one pixel and one channel, in channels_last memory.
inline Tensor checked_map(const Tensor& map, const char* name, at::IntArrayRef sizes = {ANY, ANY, ANY, ANY}) {
  check(map, name, sizes);
  TORCH_CHECK(map.numel() > 0, name, " must not be empty, but is of shape ", map.sizes());
  return map.contiguous(at::MemoryFormat::ChannelsLast);
}

// Memory beyond this is always fresh from the system, which clears it page by page as it is touched: in large pages that
// is several times quicker.
inline Tensor in_large_pages(Tensor tensor) {
#ifdef MADV_HUGEPAGE
  constexpr size_t threshold = 32 << 20, page = 4096;
  if (tensor.nbytes() > threshold) {
    const auto start = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(start), tensor.nbytes() - page, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

inline Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return in_large_pages(at::empty(sizes, options.memory_format(at::MemoryFormat::ChannelsLast)));
}

inline Tensor empty_map(const Tensor& like, int64_t channels) {
  return empty_map({like.size(0), channels, like.size(2), like.size(3)}, like.options());
}

inline Tensor empty_map(const Tensor& like) {
  return empty_map(like.sizes(), like.options());
}

// In place of a gradient that is not required, where a list cannot hold an undefined tensor.
inline Tensor no_gradient(const Tensor& like) {
  return at::empty({0}, like.options());
}

// A map in channels_last memory as a matrix of pixels x channels.
inline Tensor pixels(const Tensor& map) {
  const int64_t channels = map.size(1);
  return map.as_strided({map.numel() / channels, channels}, {channels, 1});
}

inline const float* data(const Tensor& tensor) {
  return tensor.const_data_ptr<float>();
}

inline float* mutable_data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<float>();
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace mmstrip
