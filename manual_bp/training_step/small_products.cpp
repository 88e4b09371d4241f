// Products of small matrices: out = beta c + alpha a b.
//
// For these, a library for products takes longer to be called, and to copy a and b to a layout of
// its own, than to multiply. Here a block of out stays in registers, and a and b are read where
// they are. This is compiled into the machine code of a step. Other products are left to the
// library.

#include <cstring>

namespace manual_bp {
namespace {

// How many bytes a register holds, and how large blocks are, so that they fit into all registers.
#if defined(__AVX512F__)
constexpr int BYTES = 64, SIDE = 5, ROWS = 5, WIDE = 3;
#elif defined(__AVX__)
constexpr int BYTES = 32, SIDE = 3, ROWS = 6, WIDE = 2;
#else
constexpr int BYTES = 16, SIDE = 3, ROWS = 6, WIDE = 2;
#endif
// Up to how many multiplications a product is small.
constexpr int64_t MOST = 262144;

struct Matrix {
  void* start;
  int32_t dtype;
  int64_t sizes[2], strides[2];

  explicit Matrix(AtenTensorHandle tensor) {
    int64_t dims, *size, *stride;
    aoti_torch_get_data_ptr(tensor, &start);
    aoti_torch_get_dtype(tensor, &dtype);
    aoti_torch_get_dim(tensor, &dims);
    aoti_torch_get_sizes(tensor, &size);
    aoti_torch_get_strides(tensor, &stride);
    for (int d = 0; d < 2; d++) {  // a vector, or a single row, may be c for every row of out
      const int from = d - 2 + int(dims);
      sizes[d] = from < 0 ? 1 : size[from];
      strides[d] = from < 0 || size[from] == 1 ? 0 : stride[from];
    }
  }

  bool has_rows() const { return strides[1] == 1 || sizes[1] == 1; }
  bool has_columns() const { return strides[0] == 1 || sizes[0] == 1; }
};

#if defined(__GNUC__)
// PyTorch has the calls compiled without optimizing for speed.
#define MANUAL_BP_OPTIMIZED \
  __attribute__((           \
      optimize("O3", "no-tree-slp-vectorize", "fp-contract=fast"), flatten, noinline))

template <class T>
struct Product {
  typedef T Vector __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int LANES = BYTES / sizeof(T);

  T *out, *c, *a, *b;
  int64_t rows, columns, depth, out_row, c_row, c_column, a_row, a_column, b_row, b_column;
  T alpha, beta;

  static Vector load(const T* from) { return *(const Vector*)from; }
  static void store(T* to, Vector v) { *(Vector*)to = v; }

  static Vector load(const T* from, int64_t count) {
    Vector v = {};
    std::memcpy(&v, from, count * sizeof(T));
    return v;
  }

  // Which elements are the last of a vector.
  static auto last(int64_t count) {
    Vector lane;
    for (int i = 0; i < LANES; i++) lane[i] = T(i);
    return lane >= T(LANES - count);
  }

  // The sum of a vector, of the two halves of which one is added to the other.
  template <int COUNT = LANES>
  static T sum(const void* from) {
    if constexpr (COUNT == 1) {
      T total;
      std::memcpy(&total, from, sizeof(T));
      return total;
    } else {
      typedef T Half __attribute__((vector_size(COUNT / 2 * sizeof(T))));
      Half one, other;
      std::memcpy(&one, from, sizeof(Half));
      std::memcpy(&other, (const char*)from + sizeof(Half), sizeof(Half));
      one += other;
      return sum<COUNT / 2>(&one);
    }
  }

  // Forward: rows of a times columns of b, both contiguous.
  MANUAL_BP_OPTIMIZED void dots() const {
    int64_t j = 0;
    for (; j + SIDE <= columns; j += SIDE) dots_of_columns<SIDE>(j);
    for (; j < columns; j++) dots_of_columns<1>(j);
  }

  template <int J>
  void dots_of_columns(int64_t j) const {
    int64_t i = 0;
    for (; i + SIDE <= rows; i += SIDE) dots_of_block<SIDE, J>(i, j);
    for (; i < rows; i++) dots_of_block<1, J>(i, j);
  }

  template <int I, int J>
  void dots_of_block(int64_t i, int64_t j) const {
    const int64_t down = a_row, right = b_column, rest = depth % LANES;
    const T *x = a + i * down, *w = b + j * right;
    Vector total[I][J] = {};
    auto add = [&](auto read_a, auto read_b) {
      Vector v[I];
      for (int m = 0; m < I; m++) v[m] = read_a(x + m * down);
      for (int n = 0; n < J; n++) {
        Vector u = read_b(w + n * right);
        for (int m = 0; m < I; m++) total[m][n] += v[m] * u;
      }
    };
    auto read = [](const T* from) { return load(from); };
    for (int64_t k = depth / LANES; k; k--, x += LANES, w += LANES) add(read, read);
    if (rest && depth > LANES) {  // a vector that ends with the row, and has begun before
      x += rest - LANES, w += rest - LANES;
      const auto mask = last(rest);
      add([&](const T* from) { return mask ? load(from) : Vector{}; }, read);
    } else if (rest) {
      auto read_rest = [&](const T* from) { return load(from, rest); };
      add(read_rest, read_rest);
    }
    for (int m = 0; m < I; m++)
      for (int n = 0; n < J; n++) {
        const T old = beta ? beta * c[(i + m) * c_row + (j + n) * c_column] : T(0);
        out[(i + m) * out_row + j + n] = old + alpha * sum(&total[m][n]);
      }
  }

  // BP2, BP4: rows of b, each times an element of a, if b, c and out have contiguous rows.
  // In BP4 a is a transposed matrix, and a_row is 1.
  template <bool TRANSPOSED>
  MANUAL_BP_OPTIMIZED void sums() const {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) sums_of_rows<ROWS, TRANSPOSED>(i);
    for (; i < rows; i++) sums_of_rows<1, TRANSPOSED>(i);
  }

  template <int I, bool TRANSPOSED>
  void sums_of_rows(int64_t i) const {
    const int64_t rest = columns % LANES;
    auto read = [](const T* from) { return load(from); };
    auto write = [](T* to, Vector v) { store(to, v); };
    int64_t j = 0;
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
      sums_of_block<I, WIDE, TRANSPOSED>(i, j, read, write);
    for (; j + LANES <= columns; j += LANES)
      sums_of_block<I, 1, TRANSPOSED>(i, j, read, write);
    if (rest && columns > LANES) {  // a vector that ends with the row, and has begun before
      const auto mask = last(rest);
      auto write_rest = [&](T* to, Vector v) { store(to, mask ? v : load(to)); };
      sums_of_block<I, 1, TRANSPOSED>(i, columns - LANES, read, write_rest);
    } else if (rest) {
      auto read_rest = [&](const T* from) { return load(from, rest); };
      auto write_rest = [&](T* to, Vector v) { std::memcpy(to, &v, rest * sizeof(T)); };
      sums_of_block<I, 1, TRANSPOSED>(i, 0, read_rest, write_rest);
    }
  }

  template <int I, int J, bool TRANSPOSED, class Read, class Write>
  void sums_of_block(int64_t i, int64_t j, Read read, Write write) const {
    const int64_t down = TRANSPOSED ? 1 : a_row, right = a_column, next = b_row;
    const T *x = a + i * down, *w = b + j;
    Vector total[I][J] = {};
    for (int64_t k = depth; k; k--, x += right, w += next) {
      Vector v[J];
      for (int n = 0; n < J; n++) v[n] = read(w + n * LANES);
      for (int m = 0; m < I; m++)
        for (int n = 0; n < J; n++) total[m][n] += x[m * down] * v[n];
    }
    const T times = alpha, keep = beta;
    const int64_t from_row = c_row, to_row = out_row;
    const T* from = c + i * from_row + j;
    T* to = out + i * to_row + j;
    if (times == 1 && keep == 1) {  // as in BP4, where factors would take as long as a sample
      for (int m = 0; m < I; m++)
        for (int n = 0; n < J; n++) total[m][n] += read(from + m * from_row + n * LANES);
    } else {
      for (int m = 0; m < I; m++)
        for (int n = 0; n < J; n++) {
          total[m][n] *= times;
          if (keep) total[m][n] += keep * read(from + m * from_row + n * LANES);
        }
    }
    for (int m = 0; m < I; m++)
      for (int n = 0; n < J; n++) write(to + m * to_row + n * LANES, total[m][n]);
  }
};

// Whether the product was small, and is done.
template <class T>
bool multiply(
    const Matrix& out, const Matrix& c, const Matrix& a, const Matrix& b, T beta, T alpha) {
  const Product<T> product{
      (T*)out.start, (T*)c.start, (T*)a.start, (T*)b.start, out.sizes[0], out.sizes[1], a.sizes[1],
      out.strides[0], c.strides[0], c.strides[1], a.strides[0], a.strides[1], b.strides[0],
      b.strides[1], alpha, beta};
  if (product.rows * product.columns * product.depth > MOST || !out.has_rows()) return false;
  if (a.has_rows() && b.has_columns()) {
    product.dots();
  } else if (!b.has_rows() || (beta && c.strides[1] != 1 && product.columns > 1)) {
    return false;
  } else if (a.has_columns()) {
    product.template sums<true>();
  } else {
    product.template sums<false>();
  }
  return true;
}
#else
template <class T>
bool multiply(const Matrix&, const Matrix&, const Matrix&, const Matrix&, T, T) {
  return false;
}
#endif

AOTITorchError addmm_out(
    AtenTensorHandle out, AtenTensorHandle c, AtenTensorHandle a, AtenTensorHandle b, double beta,
    double alpha) {
  const Matrix to(out), added(c), left(a), right(b);
  bool is_done = false;
  if (to.dtype == aoti_torch_dtype_float32())
    is_done = multiply<float>(to, added, left, right, float(beta), float(alpha));
  else if (to.dtype == aoti_torch_dtype_float64())
    is_done = multiply<double>(to, added, left, right, beta, alpha);
  if (is_done) return AOTI_TORCH_SUCCESS;
  return aoti_torch_cpu_addmm_out(out, c, a, b, beta, alpha);
}

}  // namespace
}  // namespace manual_bp
