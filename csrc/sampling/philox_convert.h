// Which conversion of Philox words a storage type takes. Free of torch, for device code and the host shim.
#pragma once
#include "../common/philox.h"

namespace synthfast {

template <typename T>
using NormalsOf = PhiloxNormals;

template <typename T>
struct MantissaDigits;
template <>
struct MantissaDigits<float> {
  static constexpr int value = 24;
};
template <>
struct MantissaDigits<float16> {
  static constexpr int value = 11;
};
template <>
struct MantissaDigits<bfloat16> {
  static constexpr int value = 8;
};

template <typename T>
using UniformsOf = PhiloxUniforms<MantissaDigits<T>::value>;

}  // namespace synthfast
