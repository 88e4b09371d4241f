AOTITorchError manual_bp_addmm_out(
    AtenTensorHandle out, AtenTensorHandle c, AtenTensorHandle a, AtenTensorHandle b,
    double beta, double alpha);

// A product of small matrices, where the library for products takes longer to be called, and to
// copy matrices to a layout of its own, than to multiply: out = beta c + alpha a b.
#if defined(__GNUC__)

typedef REAL Vector __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
enum { LANES = 64 / sizeof(REAL), ROWS = 6 };

static inline Vector manual_bp_load(const REAL* p) { return *(const Vector*)p; }

static inline REAL manual_bp_sum(Vector v) {
  REAL total = 0;
  for (int lane = 0; lane < LANES; lane++) total += v[lane];
  return total;
}

#endif
