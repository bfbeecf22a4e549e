// Weights in files: their types, converting rows, and what lies in a model's files.
#include "context.h"

#include <map>

namespace binding {

namespace {

py::list types() {
    py::list out;
    sd_type type;
    for (int i = 0; sd_get_type(i, &type); i++) {
        out.append(py::dict("name"_a = text(type.name), "number"_a = type.number, "block"_a = type.block,
                            "block_bytes"_a = type.block_bytes, "can_read"_a = type.can_read,
                            "can_write"_a = type.can_write, "wants_importance"_a = type.wants_importance));
    }
    return out;
}

// What a type takes; the library says which name it does not know.
sd_type type_named(const std::string & name) {
    sd_type type{};
    for (int i = 0; sd_get_type(i, &type); i++) {
        if (name == type.name) {
            return type;
        }
    }
    raise(SD_BAD_ARGUMENT, py::str("type {!r} is not known; 'q8_0', 'q4_K' and 'f16' are").format(name));
}

Bytes convert_rows(const std::string & from_type, const py::buffer & from, const std::string & to_type,
                   int64_t rows, int64_t row_length, const std::optional<Floats> & importance) {
    const sd_type source = type_named(from_type), target = type_named(to_type);
    const py::buffer_info in = from.request();
    const auto bytes = [&](const sd_type & type) {
        if (rows < 0 || row_length < 0 || row_length % type.block != 0) {
            raise(SD_BAD_ARGUMENT, py::str("{} rows of {} are no whole blocks of {}, which has {} in a block")
                                       .format(rows, row_length, type.name, type.block));
        }
        return rows * (row_length / type.block) * static_cast<int64_t>(type.block_bytes);
    };
    const int64_t have = in.size * in.itemsize, want = bytes(source);
    if (have != want || !PyBuffer_IsContiguous(in.view(), 'C')) {
        raise(SD_BAD_ARGUMENT, py::str("{} rows of {} take {} bytes as {}, not {}, side by side")
                                   .format(rows, row_length, want, source.name, have));
    }
    if (importance && importance->size() != row_length) {
        raise(SD_BAD_ARGUMENT, py::str("importance: has {} numbers for rows of {}").format(importance->size(), row_length));
    }
    Bytes out(Sizes{static_cast<py::ssize_t>(bytes(target))});
    uint8_t * to = out.mutable_data();
    const float * columns = importance ? importance->data() : nullptr;
    const sd_status status = released([&] {
        return sd_convert_rows(source.name, in.ptr ? in.ptr : to, target.name, to, rows, row_length, columns);
    });
    check(status);
    return out;
}

using Components = std::map<std::string, std::string>;

std::vector<sd_component> c_components(const Components & components) {
    std::vector<sd_component> parts;
    for (const auto & [role, path] : components) {
        parts.push_back({c_text(role, "components"), c_text(path, role.c_str())});
    }
    return parts;
}

// ([(name, type, shape, dims, path, offset, bytes), ...], metadata)
py::tuple list_tensors(const std::string & model, const Components & components) {
    struct Call {
        py::list tensors;
        py::dict metadata;
        Raised raised;
    } call;
    const auto on_tensor = [](const sd_stored * tensor, void * user) {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            self.tensors.append(py::make_tuple(text(tensor->name), text(tensor->type), numpy_shape(tensor->ne, tensor->dims),
                                               tensor->dims, py::bytes(tensor->path), tensor->offset, tensor->bytes));
            return true;
        });
    };
    const auto on_metadata = [](const char * key, const char * value, void * user) {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            self.metadata[text(key)] = text(value);
            return true;
        });
    };
    const char * path = c_text(model, "model");
    const std::vector<sd_component> parts = c_components(components);
    const sd_status status = released([&] {
        return sd_list_tensors(path, parts.data(), static_cast<int>(parts.size()), on_tensor, on_metadata, &call);
    });
    call.raised.rethrow();
    check(status);
    return py::make_tuple(call.tensors, call.metadata);
}

// (family, [{name, diffusers_name, shape, first_row, rows, swap_halves, table}, ...])
py::tuple list_weights(const std::string & model, const Components & components, const std::string & data_dir) {
    struct Call {
        py::list weights;
        Raised raised;
    } call;
    const auto on_weight = [](const sd_declared * weight, void * user) {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            self.weights.append(py::dict("name"_a = text(weight->name), "diffusers_name"_a = text(weight->diffusers_name),
                                         "shape"_a = numpy_shape(weight->ne, -1), "first_row"_a = weight->first_row,
                                         "rows"_a = weight->rows, "swap_halves"_a = weight->swap_halves,
                                         "table"_a = weight->table));
            return true;
        });
    };
    const std::vector<sd_component> parts = c_components(components);
    sd_open_params params = sd_default_open_params();
    params.model = c_text(model, "model");
    params.components = parts.data();
    params.n_components = static_cast<int>(parts.size());
    params.data_dir = c_text(data_dir, "data_dir");
    const char * family = "";
    const sd_status status = released([&] {
        return sd_list_weights(&params, &family, on_weight, &call);
    });
    call.raised.rethrow();
    check(status);
    return py::make_tuple(text(family), call.weights);
}

} // namespace

void bind_weights(py::module_ & m) {
    m.def("types", &types);
    m.def("convert_rows", &convert_rows, "from_type"_a, "data"_a, "to_type"_a, "rows"_a, "row_length"_a,
          "importance"_a = py::none());
    m.def("list_tensors", &list_tensors, "model"_a, "components"_a = Components());
    m.def("list_weights", &list_weights, "model"_a, py::kw_only(), "components"_a = Components(), "data_dir"_a);
}

} // namespace binding
