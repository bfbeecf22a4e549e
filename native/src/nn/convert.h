// Rows of elements of one type as another: all that ggml quantises to, and the types of safetensors files.
#pragma once

#include "core/dtype.h"

#include <cstdint>

namespace sd {

// What convert_rows() takes and makes.
bool can_read(DType type);
bool can_write(DType type);

// Whether a type quantises poorly unless it is told which columns matter.
bool wants_importance(DType type);

// Bytes of a row. Throws Error(bad_argument) where it is not a whole number of the type's blocks.
size_t row_bytes(DType type, int64_t row_length);

// Converts by way of f32; of a type to itself, copies. Quantised types get what ggml's own routines make of the row.
// `importance` is null or has a weight from 0 up per column, that types with a choice of scales heed; null counts as
// equal weights. Rows do not depend on each other, and threads may convert different ones.
//
// Throws Error(bad_argument) where a finite number has no place in the target type, or where a quantised type would
// get one that is not finite or beyond 65,504, which spoils its whole block.
void convert_rows(DType from, const void * source, DType to, void * target, int64_t rows, int64_t row_length,
                  const float * importance = nullptr);

} // namespace sd
