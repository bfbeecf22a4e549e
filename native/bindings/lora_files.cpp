// LoRA files without a model, as sdcpp_py.lora's tools see them.
#include "context.h"

#include "sdcpp_probe.h"

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace {

using namespace binding;

using Part = std::tuple<std::string, int64_t, int64_t, bool>;
// Name, diffusers' name, shape, parts, and whether it is a table of embeddings.
using OutlineWeight = std::tuple<std::string, std::string, std::vector<int64_t>, std::vector<Part>, bool>;

class LoraFile {
  public:
    LoraFile(const std::string & path, const std::vector<OutlineWeight> & outline) {
        std::vector<std::vector<sd_outline_part>> parts(outline.size());
        std::vector<sd_outline_weight> weights;
        for (size_t i = 0; i < outline.size(); i++) {
            const auto & [name, diffusers, shape, given, table] = outline[i];
            for (const auto & [part, first_row, rows, swap] : given) {
                parts[i].push_back({c_text(part, "outline"), first_row, rows, swap});
            }
            sd_outline_weight weight{c_text(name, "outline"), c_text(diffusers, "outline"), {1, 1, 1, 1}, table,
                                     parts[i].data(), static_cast<int>(parts[i].size())};
            if (shape.empty() || shape.size() > 4) {
                raise(SD_BAD_ARGUMENT, py::str("{}: has {} dimensions").format(name, shape.size()));
            }
            std::reverse_copy(shape.begin(), shape.end(), weight.ne);
            weights.push_back(weight);
        }
        const char * file = c_text(path, "path");
        const char * json = nullptr;
        sd_lora_file * opened = nullptr;
        check(released([&] {
            return sd_probe_lora_file_open(file, weights.data(), static_cast<int>(weights.size()), &opened, &json);
        }));
        handle_ = std::shared_ptr<sd_lora_file>(opened, sd_probe_lora_file_close);
        report_ = text(json);
    }

    py::str report() const { return report_; }

    py::list stems() const {
        py::list out;
        sd_lora_stem stem;
        for (int i = 0; sd_probe_lora_file_stem(handle_.get(), i, &stem); i++) {
            out.append(py::dict(
                "stem"_a = text(stem.stem), "format"_a = text(stem.format), "weight"_a = stem.weight,
                "bias"_a = stem.bias, "first_row"_a = stem.first_row, "rows"_a = stem.rows, "out"_a = stem.out,
                "columns"_a = stem.columns, "kernel"_a = py::make_tuple(stem.kh, stem.kw), "absent"_a = stem.absent,
                "type"_a = text(stem.type)));
        }
        return out;
    }

    py::list read(int stem) const {
        struct Call {
            py::list out;
            Raised raised;
        } call;
        const auto receive = [](const sd_lora_module * module, void * user) {
            Call & self = *static_cast<Call *>(user);
            self.raised.guard([&] {
                py::dict factors;
                for (int i = 0; i < module->n_factors; i++) {
                    const sd_lora_factor & factor = module->factors[i];
                    factors[factor.role] = Floats(Sizes(factor.shape, factor.shape + factor.dims), factor.data);
                }
                const py::object constraint =
                    module->constraint < 0 ? py::object(py::none()) : py::float_(module->constraint);
                self.out.append(py::dict(
                    "kind"_a = text(module->kind), "weight"_a = module->weight, "first_row"_a = module->first_row,
                    "rows"_a = module->rows, "swap_halves"_a = module->swap_halves, "scale"_a = module->scale,
                    "on_input"_a = module->on_input, "magnitude_of_columns"_a = module->magnitude_of_columns,
                    "constraint"_a = constraint, "factors"_a = factors));
                return true;
            });
        };
        const sd_status status = released([&] { return sd_probe_lora_file_read(handle_.get(), stem, receive, &call); });
        call.raised.rethrow();
        check(status);
        return call.out;
    }

    // [rows, columns]
    Floats delta(int stem, int module, int64_t rows, const std::optional<Floats> & base, float multiplier) const {
        struct Call {
            Floats out;
            int64_t rows;
            Raised raised;
        } call{{}, std::max<int64_t>(1, rows), {}};
        const auto receive = [](const sd_tensor * result, void * user) {
            Call & self = *static_cast<Call *>(user);
            self.raised.guard([&] {
                if (result->ne[0] % self.rows != 0) {
                    throw py::value_error("rows do not divide the change");
                }
                self.out = Floats(Sizes{self.rows, result->ne[0] / self.rows}, result->data);
                return true;
            });
        };
        const float * weights = base ? base->data() : nullptr;
        const sd_status status = released([&] {
            return sd_probe_lora_file_delta(handle_.get(), stem, module, weights, base ? base->size() : 0, multiplier,
                                            receive, &call);
        });
        call.raised.rethrow();
        check(status);
        return call.out;
    }

  private:
    std::shared_ptr<sd_lora_file> handle_;
    py::str report_;
};

} // namespace

void binding::bind_lora_files(py::module_ & m) {
    py::class_<LoraFile>(m, "LoraFile")
        .def(py::init<const std::string &, const std::vector<OutlineWeight> &>(), "path"_a, "outline"_a)
        .def("report", &LoraFile::report)
        .def("stems", &LoraFile::stems)
        .def("read", &LoraFile::read, "stem"_a)
        .def("delta", &LoraFile::delta, "stem"_a, "module"_a, "rows"_a, "base"_a = py::none(),
             "multiplier"_a = 1.0f);
}
