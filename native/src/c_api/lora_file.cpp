// LoRA files without a model: sd_probe_lora_file_* of sdcpp_probe.h.
#include "c_api/handle.h"

#include "lora/lora_outline.h"

#include <algorithm>
#include <deque>

using sd::give;
using sd::guarded;
using sd::is_index;
using sd::need;
using sd::or_empty;

struct sd_lora_file {
    sd::LoraOutline reader;
    std::string     report;
    sd_lora_file(const char * path, std::deque<sd::Weight> outline)
        : reader(path, std::move(outline)), report(sd::report_json(reader.report())) {}

    // Of a weight of the outline.
    int index_of(const sd::Weight * weight) const {
        const auto & all = reader.weights();
        const auto at = std::find_if(all.begin(), all.end(), [&](const auto & one) { return &one == weight; });
        return static_cast<int>(at - all.begin());
    }
};

namespace {

constexpr int64_t LARGEST_SIDE = int64_t(1) << 31;

sd::Weight outlined(const sd_outline_weight & given) {
    need(given.name, "the name of a weight");
    sd::Weight out;
    out.name = given.name;
    out.diffusers = or_empty(given.diffusers_name);
    out.ne = {given.ne[0], given.ne[1], given.ne[2], given.ne[3]};
    out.table = given.table;
    for (const int64_t side : out.ne) {
        if (side < 1 || side > LARGEST_SIDE) {
            sd::fail(sd::Status::bad_argument, "%s: has a dimension of %lld", given.name, static_cast<long long>(side));
        }
    }
    for (int i = 0; i < given.n_parts; ++i) {
        const sd_outline_part & part = given.parts[i];
        out.parts.push_back({or_empty(part.diffusers_name), part.first_row, part.rows, part.swap_halves});
    }
    return out;
}

void give(const sd_lora_file & file, const sd::LoraModule & module, sd_receive_module receive, void * user) {
    std::vector<sd_lora_factor> factors;
    const auto add = [&](const char * role, const sd::Factor & factor) {
        sd_lora_factor out{role, static_cast<int>(factor.shape.size()), {1, 1, 1, 1}, factor.data.data()};
        std::copy(factor.shape.begin(), factor.shape.end(), out.shape);
        factors.push_back(out);
    };
    for (const auto & [role, factor] : module.factors) {
        add(role.c_str(), factor);
    }
    if (module.magnitude) {
        add("magnitude", *module.magnitude);
    }
    const sd::LoraTarget & target = module.target;
    const sd_lora_module   out{sd::lora_kind_name(module.kind),
                             file.index_of(target.weight),
                             target.first_row,
                             target.rows,
                             target.swap_halves,
                             module.scale,
                             module.on_input,
                             module.magnitude_of_columns,
                             module.constraint.value_or(-1),
                             factors.data(),
                             static_cast<int>(factors.size())};
    receive(&out, user);
}

} // namespace

sd_status sd_probe_lora_file_open(const char * path, const sd_outline_weight * weights, int n_weights, sd_lora_file ** file,
                            const char ** json) {
    return guarded([&] {
        need(path, "path");
        need(file, "file");
        *file = nullptr;
        std::deque<sd::Weight> outline;
        for (int i = 0; i < n_weights; ++i) {
            need(weights, "weights");
            outline.push_back(outlined(weights[i]));
        }
        *file = new sd_lora_file(path, std::move(outline));
        if (json) {
            *json = (*file)->report.c_str();
        }
    });
}

void sd_probe_lora_file_close(sd_lora_file * file) { delete file; }

bool sd_probe_lora_file_stem(const sd_lora_file * file, int index, sd_lora_stem * stem) {
    if (!file || !stem || !is_index(file->reader.entries(), index)) {
        return false;
    }
    const sd::LoraOutline::Entry & entry = file->reader.entries()[index];
    const sd::LoraTarget *        target = entry.weight ? &*entry.weight : entry.bias ? &*entry.bias : nullptr;
    const sd::StoredTensor *      largest = nullptr;
    for (const auto & member : entry.group->members) {
        if (!largest || member.tensor->bytes > largest->bytes) {
            largest = member.tensor;
        }
    }
    *stem = {entry.group->stem.c_str(),
             entry.format.c_str(),
             entry.weight ? file->index_of(entry.weight->weight) : -1,
             entry.bias ? file->index_of(entry.bias->weight) : -1,
             target ? target->first_row : 0,
             target ? target->rows : 0,
             entry.stated.out,
             entry.stated.columns,
             static_cast<int>(entry.stated.kh),
             static_cast<int>(entry.stated.kw),
             entry.absent,
             largest ? sd::dtype_name(largest->type) : ""};
    return true;
}

sd_status sd_probe_lora_file_read(const sd_lora_file * file, int stem, sd_receive_module receive, void * user) {
    return guarded([&] {
        need(file, "file");
        need(reinterpret_cast<const void *>(receive), "receive");
        if (!is_index(file->reader.entries(), stem)) {
            sd::fail(sd::Status::bad_argument, "the file has no stem %d", stem);
        }
        for (const sd::LoraModule & module : file->reader.read(static_cast<size_t>(stem))) {
            give(*file, module, receive, user);
        }
    });
}

sd_status sd_probe_lora_file_delta(const sd_lora_file * file, int stem, int module, const float * base, int64_t n_base,
                                   float multiplier, sd_receive receive, void * user) {
    return guarded([&] {
        need(file, "file");
        if (!is_index(file->reader.entries(), stem) || module < 0) {
            sd::fail(sd::Status::bad_argument, "the file has no stem %d", stem);
        }
        give(file->reader.delta(static_cast<size_t>(stem), static_cast<size_t>(module), base, n_base, multiplier), receive,
             user);
    });
}
