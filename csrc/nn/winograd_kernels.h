// The loops of winograd_conv3x3 for one instruction set. Included once for each (winograd_conv3x3.cpp), inside a namespace of its
// own, with SF_TARGET (function attribute), kLanes (floats in a vector), kRows (rows of a register block) and fma() defined:
// compilers lower vector types before they inline, so the functions themselves must carry the instruction set.

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

SF_TARGET SF_INLINE Vector load(const float* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

SF_TARGET SF_INLINE void store(float* target, Vector value) { __builtin_memcpy(target, &value, sizeof value); }

SF_TARGET SF_INLINE Vector all(float value) {
  return Vector{} + value;
}

// Comparisons with NaN are false: it stays NaN, and its gradient passes, as in torch.relu.
SF_TARGET SF_INLINE Vector relu(Vector value) {
  const Mask negative = value < Vector{};
  return negative ? Vector{} : value;
}

// B^T d: six values of a line of the input tile.
SF_TARGET SF_INLINE void input_line(Vector& d0, Vector& d1, Vector& d2, Vector& d3, Vector& d4, Vector& d5) {
  const Vector a2 = all(kA2), b2 = all(kB2), a = all(kA), b = all(kB), sum = all(kA2 + kB2), product = all(kA2 * kB2);
  const Vector even_a = fma(-b2, d2, d4), odd_a = fma(-b2, d1, d3);
  const Vector even_b = fma(-a2, d2, d4), odd_b = fma(-a2, d1, d3);
  const Vector first = fma(product, d0, fma(-sum, d2, d4)), last = fma(product, d1, fma(-sum, d3, d5));
  d0 = first;
  d1 = fma(a, odd_a, even_a);
  d2 = fma(-a, odd_a, even_a);
  d3 = fma(b, odd_b, even_b);
  d4 = fma(-b, odd_b, even_b);
  d5 = last;
}

// A^T m: four values of a line of the output tile, in place of the first four.
SF_TARGET SF_INLINE void output_line(Vector& m0, Vector& m1, Vector& m2, Vector& m3, Vector m4, Vector m5) {
  const Vector sum_a = m1 + m2, difference_a = m1 - m2, sum_b = m3 + m4, difference_b = m3 - m4;
  m0 = m0 + (sum_a + sum_b);
  m1 = fma(all(kB), difference_b, all(kA) * difference_a);
  m2 = fma(all(kB2), sum_b, all(kA2) * sum_a);
  m3 = fma(all(kB * kB2), difference_b, fma(all(kA * kA2), difference_a, m5));
}

// G g: six values from a line of three weights.
SF_TARGET SF_INLINE void weight_line(Vector g0, Vector g1, Vector g2, Vector (&u)[6]) {
  const Vector even_a = fma(all(kA2), g2, g0), odd_a = all(kA) * g1;
  const Vector even_b = fma(all(kB2), g2, g0), odd_b = all(kB) * g1;
  u[0] = all(kG0) * g0;
  u[1] = all(kGA) * (even_a + odd_a);
  u[2] = all(kGA) * (even_a - odd_a);
  u[3] = all(kGB) * (even_b + odd_b);
  u[4] = all(kGB) * (even_b - odd_b);
  u[5] = g2;
}

template <bool kWhole>
SF_TARGET SF_INLINE Vector load_some(const float* source, int64_t n) {
  if constexpr (kWhole) return load(source);
  Vector value = {};
  for (int64_t i = 0; i < n; ++i) value[i] = source[i];
  return value;
}

template <bool kWhole>
SF_TARGET SF_INLINE void store_some(float* target, Vector value, int64_t n) {
  if constexpr (kWhole) return store(target, value);
  for (int64_t i = 0; i < n; ++i) target[i] = value[i];
}

// kLanes channels of a tile (the `n` that there are).
template <bool kWhole, bool kAffine, bool kRelu>
SF_TARGET SF_INLINE void input_chunk(const float* const* pixels, int64_t c, int64_t n, const Activation& activation, float* out,
                                     int64_t stride) {
  const Vector scale = kAffine ? load_some<kWhole>(activation.scale + c, n) : Vector{};
  const Vector shift = kAffine ? load_some<kWhole>(activation.shift + c, n) : Vector{};
  Vector d[6][6];
  for (int i = 0; i < 6; ++i) {
    Vector line[6];
    SF_UNROLL
    for (int j = 0; j < 6; ++j) {
      const float* pixel = pixels[6 * i + j];
      line[j] = Vector{};
      if (pixel != nullptr) {
        line[j] = load_some<kWhole>(pixel + c, n);
        if constexpr (kAffine) line[j] = fma(scale, line[j], shift);
        if constexpr (kRelu) line[j] = relu(line[j]);
      }
    }
    input_line(line[0], line[1], line[2], line[3], line[4], line[5]);
    SF_UNROLL
    for (int j = 0; j < 6; ++j) d[i][j] = line[j];
  }
  for (int j = 0; j < 6; ++j) {
    input_line(d[0][j], d[1][j], d[2][j], d[3][j], d[4][j], d[5][j]);
    SF_UNROLL
    for (int i = 0; i < 6; ++i) store(out + (6 * i + j) * stride + c, d[i][j]);
  }
}

template <bool kAffine, bool kRelu>
SF_TARGET SF_INLINE void input_chunks(const float* const* pixels, int64_t channels, const Activation& activation, float* out,
                                      int64_t stride) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes)
    input_chunk<true, kAffine, kRelu>(pixels, c, kLanes, activation, out, stride);
  if (c < channels) input_chunk<false, kAffine, kRelu>(pixels, c, channels - c, activation, out, stride);
}

// One tile of 6 x 6 pixels (null: outside of the image, where the activation is 0 too), all channels: 36 rows, each `stride`
// floats after the one before, filled up with zeros to a whole vector.
SF_TARGET inline void input_tile(const float* const* pixels, int64_t channels, const Activation& activation, float* out,
                                 int64_t stride) {
  if (activation.scale != nullptr) return input_chunks<true, true>(pixels, channels, activation, out, stride);
  if (activation.relu) return input_chunks<false, true>(pixels, channels, activation, out, stride);
  input_chunks<false, false>(pixels, channels, activation, out, stride);
}

template <bool kWhole>
SF_TARGET SF_INLINE void output_chunk(const float* rows, int64_t stride, int64_t c, int64_t n, const Epilogue& epilogue,
                                      const int64_t* at) {
  Vector m[4][6];
  for (int j = 0; j < 6; ++j) {
    Vector line[6];
    SF_UNROLL
    for (int i = 0; i < 6; ++i) line[i] = load(rows + (6 * i + j) * stride + c);
    output_line(line[0], line[1], line[2], line[3], line[4], line[5]);
    SF_UNROLL
    for (int i = 0; i < 4; ++i) m[i][j] = line[i];
  }
  const Vector bias = epilogue.bias != nullptr ? load_some<kWhole>(epilogue.bias + c, n) : Vector{};
  const bool affine = epilogue.activation.scale != nullptr;
  const Vector scale = affine ? load_some<kWhole>(epilogue.activation.scale + c, n) : all(1.0f);
  const Vector shift = affine ? load_some<kWhole>(epilogue.activation.shift + c, n) : Vector{};
  for (int i = 0; i < 4; ++i) {
    output_line(m[i][0], m[i][1], m[i][2], m[i][3], m[i][4], m[i][5]);
    SF_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t pixel = at[4 * i + j];
      if (pixel < 0) continue;
      Vector value = m[i][j] + bias;
      if (epilogue.residual != nullptr) value = value + load_some<kWhole>(epilogue.residual + pixel + c, n);
      if (epilogue.input != nullptr) {
        const Mask closed = fma(scale, load_some<kWhole>(epilogue.input + pixel + c, n), shift) <= Vector{};
        value = closed ? Vector{} : value * scale;
      }
      store_some<kWhole>(epilogue.out + pixel + c, value, n);
    }
  }
}

// One tile of 4 x 4 pixels from 36 rows. `at` holds the offset of each pixel in the tensors of the output, -1 outside.
SF_TARGET inline void output_tile(const float* rows, int64_t stride, int64_t channels, const Epilogue& epilogue,
                                  const int64_t* at) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) output_chunk<true>(rows, stride, c, kLanes, epilogue, at);
  if (c < channels) output_chunk<false>(rows, stride, c, channels - c, epilogue, at);
}

// kR rows of `a` [rows, depth] times `kWidth` columns of a panel [depth, kPanel].
constexpr int kColumns = 2, kWidth = kColumns * kLanes;

template <int kR>
SF_TARGET inline void multiply_rows(const float* __restrict a, int64_t a_stride, const float* __restrict b, int64_t depth,
                                    float* __restrict out, int64_t out_stride) {
  Vector sum[kR][kColumns];
  SF_UNROLL
  for (int r = 0; r < kR; ++r) sum[r][0] = sum[r][1] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector b0 = load(b + k * kPanel), b1 = load(b + k * kPanel + kLanes);
    SF_UNROLL
    for (int r = 0; r < kR; ++r) {
      const Vector value = all(a[r * a_stride + k]);
      sum[r][0] = fma(value, b0, sum[r][0]);
      sum[r][1] = fma(value, b1, sum[r][1]);
    }
  }
  SF_UNROLL
  for (int r = 0; r < kR; ++r) {
    store(out + r * out_stride, sum[r][0]);
    store(out + r * out_stride + kLanes, sum[r][1]);
  }
}

template <int kR>
SF_TARGET inline void multiply_at_most(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth, float* out,
                                       int64_t out_stride) {
  if (rows == kR) return multiply_rows<kR>(a, a_stride, b, depth, out, out_stride);
  if constexpr (kR > 1) multiply_at_most<kR - 1>(rows, a, a_stride, b, depth, out, out_stride);
}

// `rows` rows of `a` times one panel: register blocks of nearly equal height.
SF_TARGET inline void multiply_panel(int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t depth,
                                     float* out, int64_t out_stride) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t column = 0; column < kPanel; column += kWidth)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = rows * i / blocks, end = rows * (i + 1) / blocks;
      multiply_at_most<kRows>(end - begin, a + begin * a_stride, a_stride, panel + column, depth,
                              out + begin * out_stride + column, out_stride);
    }
}

// A line of a panel at all 36 positions: `weights` [9, kPanel] of one input channel and the outputs of the panel.
SF_TARGET inline void weight_rows(const float* weights, float* out, int64_t stride) {
  for (int c = 0; c < kPanel; c += kLanes) {
    Vector columns[3][6], u[6];
    for (int j = 0; j < 3; ++j)
      weight_line(load(weights + j * kPanel + c), load(weights + (3 + j) * kPanel + c), load(weights + (6 + j) * kPanel + c),
                  columns[j]);
    for (int i = 0; i < 6; ++i) {
      weight_line(columns[0][i], columns[1][i], columns[2][i], u);
      for (int j = 0; j < 6; ++j) store(out + (6 * i + j) * stride + c, u[j]);
    }
  }
}

constexpr Kernels kKernels = {input_tile, output_tile, multiply_panel, weight_rows};
