// A device cuda:0 in the memory of the CPU, for a torch that was built without CUDA.
//
// Every operation runs the CPU's kernel on the same bytes, so numbers are real; operations that mix its tensors with the
// CPU's raise what CUDA raises. Views, storages and factories are registered one by one, everything else falls back.

#define AT_PER_OPERATOR_HEADERS
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <set>
#include <string>
#include <vector>

using namespace at;

namespace {

const Device GPU(kCUDA, 0);
const c10::DispatchKeySet ON_GPU(c10::DispatchKey::CUDA);

// ---- the device ----------------------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  static void release(void* bytes) { c10::free_cpu(bytes); }
  DataPtr allocate(size_t size) override {
    void* bytes = size ? c10::alloc_cpu(size) : nullptr;
    return {bytes, bytes, &release, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(kCUDA, &memory)

// Nothing runs beside anything else: streams and events have nothing to do.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Index = c10::DeviceIndex;
  using Stream = c10::Stream;
  c10::DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  Index deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const Index, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const Index) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const Index) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// torch looks its CUDA library up under this class's name.
struct CUDAHooks final : at::CUDAHooksInterface {
  using Index = c10::DeviceIndex;
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(Index) const override { return true; }
  Index deviceCount() const override { return 1; }
  Index getCurrentDevice() const override { return 0; }
  void setCurrentDevice(Index) const override {}
  Index exchangeDevice(Index) const override { return 0; }
  Index maybeExchangeDevice(Index) const override { return 0; }
  Index current_device() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Device getDeviceFromPtr(void*) const override { return GPU; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(Index) const override {}
  const Generator& getDefaultGenerator(Index) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(Index) const override { return at::detail::createCPUGenerator(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// ---- any operation -------------------------------------------------------------------------------------------------

bool is_on_gpu(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kCUDA; }

// The same bytes as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!is_on_gpu(tensor)) return tensor;
  auto options = tensor.options().device(kCPU).requires_grad(false);
  void* bytes = tensor.numel() ? tensor.data_ptr() : nullptr;
  auto cpu = from_blob(bytes, tensor.sizes(), tensor.strides(), [tensor](void*) {}, options, kCPU);
  if (tensor.is_conj()) cpu._set_conj(true);
  if (tensor.is_neg()) cpu._set_neg(true);
  return cpu;
}

Tensor on_gpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kCPU) return tensor;
  Tensor gpu = at::detail::empty_strided_generic(tensor.sizes(), tensor.strides(), &memory, ON_GPU, tensor.scalar_type());
  on_cpu(gpu).copy_(tensor);
  return gpu;
}

// What CUDA allows beside scalars: indices may lie on the CPU.
bool may_mix(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  std::vector<std::pair<size_t, Tensor>> filled;  // outputs that were empty: they get their size and bytes afterwards
  bool gpu = false, cpu = false, to_gpu = true;
  auto moved = [&](const Tensor& tensor) {
    gpu |= is_on_gpu(tensor);
    cpu |= tensor.defined() && tensor.device().type() == kCPU && tensor.dim() > 0;
    return on_cpu(tensor);
  };
  auto writes = [&](const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      const Tensor tensor = value.toTensor();
      value = moved(tensor);
      if (is_on_gpu(tensor) && writes(schema.arguments()[i]) && tensor.numel() == 0) {
        const Tensor fresh = at::empty(tensor.sizes(), tensor.options().device(kCPU).requires_grad(false));
        value = fresh;
        filled.emplace_back(i, fresh);
      }
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(moved(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
        list.push_back(tensor.has_value() ? std::optional<Tensor>(moved(*tensor)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      to_gpu = value.toDevice().type() == kCUDA;
      value = c10::IValue(Device(kCPU));
    }
  }
  TORCH_CHECK(
      !(gpu && cpu) || may_mix(schema.name()),
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", schema.name(), ")");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [i, fresh] : filled) {
    const Tensor output = given[i].toTensor();
    output.resize_(fresh.sizes());
    if (fresh.strides() != output.strides()) output.as_strided_(fresh.sizes(), fresh.strides());
    if (fresh.numel()) on_cpu(output).copy_(fresh);
  }
  const auto& returns = schema.returns();
  const auto first = stack->size() - returns.size();
  for (size_t r = 0; r < returns.size(); ++r) {
    auto& value = (*stack)[first + r];
    if (value.isTensorList() && to_gpu) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(on_gpu(tensor));
      value = list;
    } else if (value.isTensor() && writes(returns[r])) {  // an argument, which is returned as it was given
      for (size_t i = 0; i < count; ++i)
        if (writes(schema.arguments()[i]) &&
            schema.arguments()[i].alias_info()->beforeSets() == returns[r].alias_info()->beforeSets())
          value = given[i];
    } else if (value.isTensor() && to_gpu) {
      value = on_gpu(value.toTensor());
    }
  }
}

// ---- factories, views and storages -----------------------------------------------------------------------------------

using Sizes = SymIntArrayRef;
using Number = std::optional<SymInt>;

Tensor empty_on_gpu(
    Sizes size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>,
    std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, ON_GPU, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided_on_gpu(
    Sizes size, Sizes stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, ON_GPU, c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& self, const Tensor& source, bool) {
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

Tensor strided(const Tensor& self, Sizes size, Sizes stride, Number offset) {
  auto start = offset.has_value() ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor viewed(const Tensor& self, Sizes size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor aliased(const Tensor& self, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resized(const Tensor& self, Sizes size, std::optional<MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt, true);
  return self;
}

Tensor& set_part(Tensor& self, Storage storage, SymInt offset, Sizes size, Sizes stride) {
  return at::native::set_storage_cpu_(
      self, storage, offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, Storage storage) { return at::native::set_(self, storage); }

Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

Tensor& set_nothing(Tensor& self) {
  return self.set_(Storage(Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true), 0, {0}, {});
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty_on_gpu));
  library.impl("empty_strided", TORCH_FN(empty_strided_on_gpu));
  library.impl("copy_", TORCH_FN(copy));
  library.impl("as_strided", TORCH_FN(strided));
  library.impl("view", TORCH_FN(viewed));
  library.impl("_reshape_alias", TORCH_FN(aliased));
  library.impl("resize_", TORCH_FN(resized));
  library.impl("set_", TORCH_FN(set_nothing));
  library.impl("set_.source_Storage", TORCH_FN(set_storage));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_part));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
}

// bitsandbytes registers slow kernels for every device, which would stand before the fallback.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, library) {
  for (const char* name :
       {"dequantize_4bit", "dequantize_4bit.out", "dequantize_blockwise", "dequantize_blockwise.out", "gemm_4bit",
        "gemv_4bit", "gemv_4bit.out", "int8_double_quant", "int8_linear_matmul", "int8_linear_matmul.out", "int8_mm_dequant",
        "int8_scaled_mm", "int8_mixed_scaled_mm", "int8_vectorwise_dequant", "int8_vectorwise_quant", "quantize_4bit",
        "quantize_blockwise"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fall_back>());
}
