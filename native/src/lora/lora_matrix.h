// The little linear algebra that adapters need on the host. Matrices lie row by row.
#pragma once

#include <cstdint>
#include <vector>

namespace sd {

// c [rows, columns] += factor · a [rows, inner] · b [inner, columns]. Each element is summed in one fixed
// order, without fused multiplication, so that any machine and any split of the rows gives the same bits.
void add_product(float * c, const float * a, const float * b, int64_t rows, int64_t inner, int64_t columns,
                 float factor);

std::vector<float> product(const std::vector<float> & a, const std::vector<float> & b, int64_t rows,
                           int64_t inner, int64_t columns);

std::vector<float> transposed(const std::vector<float> & a, int64_t rows, int64_t columns);

// A Tucker core [p, q, taps] and the factor of its second side [q, columns]: Σ_q core[p, q, t] · factor[q,
// i], laid out [p, columns, taps] as a kernel is.
std::vector<float> contracted(const std::vector<float> & core, const std::vector<float> & factor, int64_t p,
                              int64_t q, int64_t columns, int64_t taps);

// (I + q)(I − q)⁻¹ of a square matrix; a skew-symmetric one gives a rotation. Such I − q is never singular.
std::vector<double> cayley(const std::vector<double> & q, int64_t n);

} // namespace sd
