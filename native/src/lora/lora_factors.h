// Factors out of a file: decoded once, checked against the weight that they are for, and brought to the one shape
// that later code expects (see lora_module.h).
#pragma once

#include "lora/lora_module.h"
#include "lora/lora_names.h"

#include <cstdint>
#include <string>
#include <vector>

namespace sd {

// Why a module can't be used. It stays inside this folder: the file's other modules are read on.
struct Misfit {
    std::string why;
    bool        by_shape = false;
    int64_t     inputs_there = 0; // where the file has other input features than the model
};

// numpy's order. ggml drops leading dimensions of 1 when it writes a matrix: they come back here.
std::vector<int64_t> matrix_shape(const StoredTensor & stored);
std::string          shape_words(const std::vector<int64_t> & shape);
int64_t              element_count(const std::vector<int64_t> & shape);

// The one number that the tensor holds, of any type; NaN where it holds more or none.
double scalar_of(const StoredTensor & stored);

// The elements in f32, seen as `shape`, which has as many. Throws Error(bad_file), naming the tensor, where one
// is no number, and Misfit where the type holds no weights.
Factor read_factor(const StoredTensor & stored, const std::vector<int64_t> & shape);

// The same, where the shape has to be this one, up to dimensions of 1 at the end.
Factor read_exactly(const StoredTensor & stored, const std::vector<int64_t> & shape, const char * role);

// (rows, in[, kh, kw]): a factor whose columns run over a weight's inputs. The kernel's dimensions stay where the
// weight has a kernel and `with_kernel`; flattened into the columns they are unfolded. Where `padded` is given and
// the factor has fewer inputs, zeros are added, and it is set to the number that the file has.
Factor read_inputs(const StoredTensor & stored, const WeightForm & form, bool with_kernel, const char * role,
                   int64_t * padded);

// A factor over a vector's elements, in whatever dimensions it lies.
Factor read_vector(const StoredTensor & stored, int64_t length, const char * role);

// The tensor; throws Misfit where there is none, or it is empty.
const StoredTensor & need(const StoredTensor * tensor, const char * role);

// The weight's form with the rows that the target means, and the same for kinds that change no vector.
WeightForm form_at(const LoraTarget & target);
WeightForm matrix_form_at(const LoraTarget & target);

// Whether this is where the model takes its input: there alone a file may have fewer inputs than the model.
bool is_input_embedding(const Weight & weight);

// The inputs that a control LoRA has in the place of this weight's own: those, and as many of the latent of a picture to
// follow. 0 where there are no such LoRAs: FLUX alone has them.
int64_t control_inputs(const Weight & weight);

} // namespace sd
