// From a tensor's run-time type to the storage type of a kernel.
#pragma once
#include <cstddef>
#include <type_traits>

#include "check.h"
#include "host_device.h"

namespace synthfast {

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<storage type>{}).
template <typename Function>
void dispatch_float(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::Float:
      return function(Type<float>{});
    case ScalarType::BFloat16:
      return function(Type<bfloat16>{});
    case ScalarType::Half:
      return function(Type<float16>{});
    default:
      STD_TORCH_CHECK(false, "float32, bfloat16 or float16 expected, got ", torch::headeronly::toString(type));
  }
}

// Calls function(Type<state>{}, Type<output>{}): a state of 16 bits takes model outputs of its own type only.
template <typename Function>
void dispatch_state_output(ScalarType state, ScalarType output, Function&& function) {
  dispatch_float(state, [&](auto state_type) {
    using State = typename decltype(state_type)::type;
    dispatch_float(output, [&](auto output_type) {
      using Output = typename decltype(output_type)::type;
      if constexpr (std::is_same_v<State, float> || std::is_same_v<State, Output>) function(state_type, output_type);
    });
  });
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace synthfast
