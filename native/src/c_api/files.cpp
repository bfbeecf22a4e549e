// What files hold, without a context: types, tensors, the weights of a network.
#include "c_api/handle.h"

#include "nn/convert.h"

using sd::guarded;
using sd::need;
using sd::or_empty;
using sd::to_components;

namespace {

sd::DType type_named(const char * name) {
    need(name, "the name of a type");
    const sd::DTypeInfo * info = sd::dtype_by_name(name);
    if (!info) {
        sd::fail(sd::Status::bad_argument, "type '%s' is not known; q8_0, q4_K and f16 are", name);
    }
    return info->type;
}

} // namespace

bool sd_get_type(int index, sd_type * type) {
    const sd::DTypeInfo * info = sd::dtype_at(index);
    if (!type || !info) {
        return false;
    }
    *type = {info->name, static_cast<int>(info->type), info->block, info->block_bytes,
             sd::can_read(info->type), sd::can_write(info->type), sd::wants_importance(info->type)};
    return true;
}

sd_status sd_convert_rows(const char * from_type, const void * from, const char * to_type, void * to, int64_t rows,
                          int64_t row_length, const float * importance) {
    return guarded([&] {
        if (rows < 0 || row_length < 0) {
            sd::fail(sd::Status::bad_argument, "%lld rows of %lld: both must be from 0 up", static_cast<long long>(rows),
                     static_cast<long long>(row_length));
        }
        need(from, "from");
        need(to, "to");
        sd::convert_rows(type_named(from_type), from, type_named(to_type), to, rows, row_length, importance);
    });
}

sd_status sd_list_tensors(const char * model, const sd_component * components, int n_components,
                          sd_on_stored on_tensor, sd_on_metadata on_metadata, void * user) {
    return guarded([&] {
        need(model, "model");
        const sd::Checkpoint checkpoint = sd::Checkpoint::open(model, to_components(components, n_components));
        for (const sd::StoredTensor & tensor : checkpoint.tensors()) {
            const sd_stored stored{tensor.name.c_str(),
                                   sd::dtype_name(tensor.type),
                                   tensor.dims,
                                   {tensor.ne[0], tensor.ne[1], tensor.ne[2], tensor.ne[3]},
                                   tensor.file->path().c_str(),
                                   tensor.offset,
                                   tensor.bytes,
                                   tensor.scale};
            if (on_tensor && !on_tensor(&stored, user)) {
                sd::fail(sd::Status::cancelled, "the list was stopped");
            }
        }
        for (const auto & [key, value] : checkpoint.metadata()) {
            if (on_metadata && !on_metadata(key.c_str(), value.c_str(), user)) {
                sd::fail(sd::Status::cancelled, "the list was stopped");
            }
        }
    });
}

sd_status sd_list_weights(const sd_open_params * params, const char ** family, sd_on_declared on_weight, void * user) {
    return guarded([&] {
        need(params, "params");
        need(params->model, "params.model");
        sd::WeightStore weights(sd::Checkpoint::open(params->model, to_components(params->components, params->n_components)));
        const sd::Family & known = sd::recognise(weights.checkpoint());
        const auto         pipeline = known.open(weights, {or_empty(params->data_dir), or_empty(params->prediction), std::nullopt});
        if (family) {
            *family = known.name;
        }
        for (const sd::Weight & weight : weights.weights()) {
            sd_declared declared{weight.name.c_str(),
                                 weight.diffusers.c_str(),
                                 {weight.ne[0], weight.ne[1], weight.ne[2], weight.ne[3]},
                                 0,
                                 weight.ne[1] * weight.ne[2] * weight.ne[3],
                                 false,
                                 weight.table};
            bool go_on = !on_weight || !weight.parts.empty() || on_weight(&declared, user);
            for (const sd::WeightPart & part : weight.parts) {
                declared.diffusers_name = part.diffusers.c_str();
                declared.first_row = part.first_row;
                declared.rows = part.rows;
                declared.swap_halves = part.swap_halves;
                go_on = go_on && (!on_weight || on_weight(&declared, user));
            }
            if (!go_on) {
                sd::fail(sd::Status::cancelled, "the list was stopped");
            }
        }
    });
}
