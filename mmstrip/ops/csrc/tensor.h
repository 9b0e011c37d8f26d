// Tensors: checks of an operator's arguments, and maps (N, C, H, W) in channels_last memory.
//
// Maps are float32 or bfloat16, and so are all maps of a call. Parameters may be either; kernels read them as float32.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/irange.h>
#include <torch/version.h>

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
using c10::BFloat16;
using c10::irange;
using OptionalTensor = std::optional<Tensor>;

// The autograd of operators is in Python, around them.
// Under this guard, PyTorch's operations record no graph and stay in float32, even in backward under autocast.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Products in bfloat16 use PyTorch's brgemm, with its interface since 2.7.
#if defined(__AVX512F__) && (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7)
#define MMSTRIP_BFLOAT16
#endif

// Whether maps may be bfloat16: on CPUs with AVX512-BF16 on which brgemm runs. pointwise.cpp
bool takes_bfloat16();

// function(T()) for the type T of a map.
template <typename Function>
auto with_type([[maybe_unused]] at::ScalarType type, Function function) {
#ifdef MMSTRIP_BFLOAT16
  if (type == at::kBFloat16) return function(BFloat16());
#endif
  return function(float());
}

constexpr int64_t ANY = -1;  // any size

// Refuse a tensor of another type, device or size than the operators support.
inline void check(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.defined(), name, " is missing");
  const bool known = tensor.scalar_type() == at::kFloat || (takes_bfloat16() && tensor.scalar_type() == at::kBFloat16);
  TORCH_CHECK(known && tensor.device().is_cpu() && tensor.layout() == at::kStrided && !tensor.is_neg() &&
                  !tensor._is_zerotensor(),
              name, " must be a dense float32 ", takes_bfloat16() ? "or bfloat16 " : "", "tensor on the CPU, but is a ",
              tensor.toString(), " on ", tensor.device());
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (const auto i : irange(sizes.size())) fits = fits && (sizes[i] == ANY || tensor.size(i) == sizes[i]);
  if (fits) return;
  std::ostringstream allowed;
  for (const auto i : irange(sizes.size())) {
    allowed << (i ? ", " : "") << (sizes[i] == ANY ? "any" : std::to_string(sizes[i]));
  }
  TORCH_CHECK(false, name, " must have shape [", allowed.str(), "], but has ", tensor.sizes());
}

// A parameter, contiguous and in float32, to read through a pointer.
inline Tensor checked(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  check(tensor, name, sizes);
  return tensor.to(at::kFloat).contiguous();
}

inline OptionalTensor checked(const OptionalTensor& tensor, const char* name, at::IntArrayRef sizes) {
  return tensor ? OptionalTensor(checked(*tensor, name, sizes)) : tensor;
}

// Refuse a tensor that is not a map (N, C, H, W) with at least one pixel and channel. Operators check all arguments
// before they copy a map, as an expanded one is larger than its memory.
inline void check_map(const Tensor& map, const char* name, at::IntArrayRef sizes = {ANY, ANY, ANY, ANY}) {
  check(map, name, sizes);
  TORCH_CHECK(map.numel() > 0, name, " must not be empty, but has shape ", map.sizes());
}

inline Tensor in_channels_last(const Tensor& map) { return map.contiguous(at::MemoryFormat::ChannelsLast); }

// Pixels x channels of a map, or of a tensor of its type that a forward pass saved.
inline Tensor checked_rows(const Tensor& rows, const char* name, at::IntArrayRef sizes) {
  check(rows, name, sizes);
  return rows.contiguous();
}

// Larger allocations always come from the system, which clears pages on first touch; with huge pages that is several
// times faster.
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

inline Tensor empty_map(const Tensor& like) { return empty_map(like.sizes(), like.options()); }

// Stands for a gradient that is not required, as a list cannot hold an undefined tensor.
inline Tensor no_gradient(const Tensor& like) { return at::empty({0}, like.options()); }

// A map in channels_last memory as a matrix of pixels x channels.
inline Tensor pixels(const Tensor& map) {
  const int64_t channels = map.size(1);
  return map.as_strided({map.numel() / channels, channels}, {channels, 1});
}

// Refuses a tensor of another type.
template <typename T = float>
inline const T* data(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

template <typename T = float>
inline T* mutable_data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mmstrip
