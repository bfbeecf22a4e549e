// Softmax attention for very narrow heads (8 to 16 numbers) on a CPU, forward and backward.
//
// PyTorch's own kernel multiplies small tiles and wastes most of them when a head is this
// narrow. Here one (picture, head) pair is one task; its keys and values are laid out as vectors
// over 16 positions, and probabilities never leave the registers in the backward pass.
//
// q [B, L, H*D], k and v [B, S, H*D], all float32. Returns out [B, L, H*D] and the row-wise
// logarithm of the softmax denominators, lse [B, H, L].

#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int kLanes = 16, kRows = 2;  // positions in one vector; queries that share its loads
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int   Whole __attribute__((vector_size(4 * kLanes)));

// e^x for x <= 0: 2^n (1 + f ln 2 + ...) with n + f = x log2 e and |f| <= 1/2.
inline Lanes exponential(Lanes x) {
  const Lanes least = Lanes{} - 87.f;
  x = (x > least ? x : least) * 1.44269504f;
  const Whole n = __builtin_convertvector(x - 0.5f, Whole);  // truncation rounds, x being negative
  const Lanes f = x - __builtin_convertvector(n, Lanes);
  const Lanes e = 1.f + f * (0.693147182f + f * (0.240226462f + f * (0.0555041f + f * (0.0096181f + f * 0.0013333f))));
  return (Lanes)((Whole)e + (n << 23));
}

inline float sum(Lanes x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// One head of keys or values, [S, H*D] in memory, as vectors over positions: [D] per chunk.
template <int D>
struct Head {
  explicit Head(int64_t s_count) : chunks((s_count + kLanes - 1) / kLanes), data(chunks * D, Lanes{}) {}
  Head(const float* x, int64_t s_count, int64_t stride) : Head(s_count) {
    for (int64_t s = 0; s < s_count; ++s)
      for (int d = 0; d < D; ++d) at(s / kLanes)[d][s % kLanes] = x[s * stride + d];
  }
  Lanes*       at(int64_t chunk) { return &data[chunk * D]; }
  int64_t            chunks;
  std::vector<Lanes> data;
};

// 0 for real positions, a huge negative score for those that pad the last chunk.
std::vector<Lanes> padding(int64_t s_count) {
  std::vector<Lanes> bias((s_count + kLanes - 1) / kLanes, Lanes{});
  for (int64_t s = s_count; s < int64_t(bias.size()) * kLanes; ++s) bias.back()[s % kLanes] = -1e30f;
  return bias;
}

template <int D>
void forward_head(const float* q, const float* k, const float* v, float* out, float* lse,
                  int64_t l_count, int64_t s_count, int64_t stride, float scale) {
  Head<D> keys(k, s_count, stride), values(v, s_count, stride);
  const std::vector<Lanes> bias = padding(s_count);
  const int64_t chunks = keys.chunks;
  std::vector<Lanes> rows(kRows * chunks);
  for (int64_t l = 0; l < l_count; l += kRows) {
    Lanes top[kRows];
    float a[kRows][D], shift[kRows];
    for (int r = 0; r < kRows; ++r) {
      top[r] = Lanes{} - 1e30f;
      for (int d = 0; d < D; ++d) a[r][d] = q[(l + r) * stride + d] * scale;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      const Lanes* key = keys.at(c);
      for (int r = 0; r < kRows; ++r) {
        Lanes score = bias[c];
        for (int d = 0; d < D; ++d) score += a[r][d] * key[d];
        rows[c * kRows + r] = score;
        top[r] = score > top[r] ? score : top[r];
      }
    }
    Lanes total[kRows] = {}, mean[kRows][D] = {};
    for (int r = 0; r < kRows; ++r) {
      shift[r] = top[r][0];
      for (int i = 1; i < kLanes; ++i) shift[r] = std::max(shift[r], top[r][i]);
    }
    for (int64_t c = 0; c < chunks; ++c) {
      const Lanes* value = values.at(c);
      for (int r = 0; r < kRows; ++r) {
        const Lanes share = exponential(rows[c * kRows + r] - shift[r]);
        total[r] += share;
        for (int d = 0; d < D; ++d) mean[r][d] += share * value[d];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const float all = sum(total[r]);
      for (int d = 0; d < D; ++d) out[(l + r) * stride + d] = sum(mean[r][d]) / all;
      lse[l + r] = shift[r] + std::log(all);
    }
  }
}

// With P the probabilities, dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
template <int D>
void backward_head(const float* q, const float* k, const float* v, const float* out,
                   const float* lse, const float* dout, float* dq, float* dk, float* dv,
                   int64_t l_count, int64_t s_count, int64_t stride, float scale) {
  Head<D> keys(k, s_count, stride), values(v, s_count, stride), dkeys(s_count), dvalues(s_count);
  const std::vector<Lanes> bias = padding(s_count);
  for (int64_t l = 0; l < l_count; ++l) {
    float a[D], g[D], own = 0;
    for (int d = 0; d < D; ++d) {
      a[d] = q[l * stride + d] * scale;
      g[d] = dout[l * stride + d];
      own += g[d] * out[l * stride + d];
    }
    Lanes dquery[D] = {};
    for (int64_t c = 0; c < keys.chunks; ++c) {
      const Lanes *key = keys.at(c), *value = values.at(c);
      Lanes *dkey = dkeys.at(c), *dvalue = dvalues.at(c);
      Lanes score = bias[c] - lse[l], dshare = Lanes{} - own;
      for (int d = 0; d < D; ++d) score += a[d] * key[d];
      for (int d = 0; d < D; ++d) dshare += g[d] * value[d];
      const Lanes share = exponential(score), dscore = share * dshare;
      for (int d = 0; d < D; ++d) {
        dquery[d] += dscore * key[d];
        dkey[d] += dscore * a[d];  // a already holds the scale
        dvalue[d] += share * g[d];
      }
    }
    for (int d = 0; d < D; ++d) dq[l * stride + d] = sum(dquery[d]) * scale;
  }
  for (int64_t s = 0; s < s_count; ++s)
    for (int d = 0; d < D; ++d) {
      dk[s * stride + d] = dkeys.at(s / kLanes)[d][s % kLanes];
      dv[s * stride + d] = dvalues.at(s / kLanes)[d][s % kLanes];
    }
}

template <typename F>
void dispatch(int64_t width, F f) {
  switch (width) {
    case 8: f(std::integral_constant<int, 8>()); break;
    case 12: f(std::integral_constant<int, 12>()); break;
    case 16: f(std::integral_constant<int, 16>()); break;
    default: TORCH_CHECK(false, "head width ", width, " has no kernel");
  }
}

}  // namespace

std::vector<torch::Tensor> forward(torch::Tensor q, torch::Tensor k, torch::Tensor v, int64_t heads) {
  const int64_t b = q.size(0), l = q.size(1), s = k.size(1), c = q.size(2), width = c / heads;
  auto out = torch::empty_like(q), lse = torch::empty({b, heads, l}, q.options());
  const float *qp = q.data_ptr<float>(), *kp = k.data_ptr<float>(), *vp = v.data_ptr<float>();
  float *op = out.data_ptr<float>(), *lp = lse.data_ptr<float>();
  const float scale = 1.f / std::sqrt(float(width));
  TORCH_CHECK(l % kRows == 0, "an odd number of queries");
  dispatch(width, [&](auto d) {
    at::parallel_for(0, b * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i % heads * width, ql = i / heads * l * c + h, ks = i / heads * s * c + h;
        forward_head<d()>(qp + ql, kp + ks, vp + ks, op + ql, lp + i * l, l, s, c, scale);
      }
    });
  });
  return {out, lse};
}

std::vector<torch::Tensor> backward(torch::Tensor q, torch::Tensor k, torch::Tensor v,
                                    torch::Tensor out, torch::Tensor lse, torch::Tensor dout,
                                    int64_t heads) {
  const int64_t b = q.size(0), l = q.size(1), s = k.size(1), c = q.size(2), width = c / heads;
  auto dq = torch::empty_like(q), dk = torch::empty_like(k), dv = torch::empty_like(v);
  const float *qp = q.data_ptr<float>(), *kp = k.data_ptr<float>(), *vp = v.data_ptr<float>();
  const float *op = out.data_ptr<float>(), *lp = lse.data_ptr<float>(), *gp = dout.data_ptr<float>();
  float *dqp = dq.data_ptr<float>(), *dkp = dk.data_ptr<float>(), *dvp = dv.data_ptr<float>();
  const float scale = 1.f / std::sqrt(float(width));
  TORCH_CHECK(l % kRows == 0, "an odd number of queries");
  dispatch(width, [&](auto d) {
    at::parallel_for(0, b * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i % heads * width, ql = i / heads * l * c + h, ks = i / heads * s * c + h;
        backward_head<d()>(qp + ql, kp + ks, vp + ks, op + ql, lp + i * l, gp + ql, dqp + ql, dkp + ks,
                           dvp + ks, l, s, c, scale);
      }
    });
  });
  return {dq, dk, dv};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
}
