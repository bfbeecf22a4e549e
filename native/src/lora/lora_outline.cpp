#include "lora/lora_outline.h"

#include "core/error.h"
#include "core/words.h"

#include <algorithm>
#include <utility>

namespace sd {
namespace {

// Sizes are only read off here; LoraBuilder judges whether factors fit each other.
class StatedForm {
  public:
    explicit StatedForm(const LoraGroup & group) : group_(group) {}

    LoraOutline::Form read() {
        read_low_rank();
        read_hadamard();
        read_kronecker();
        read_others();
        return form_;
    }

  private:
    // The i-th dimension, numpy's order; 0 where there is no such tensor, or nothing in it, whose other dimensions may be
    // any number.
    int64_t size(LoraRole role, size_t i) const {
        const StoredTensor * tensor = group_.find(role);
        if (!tensor || count(tensor->ne) == 0) {
            return 0;
        }
        const std::vector<int64_t> shape = matrix_shape(*tensor);
        return i < shape.size() ? shape[i] : 1;
    }

    bool has(LoraRole role) const { return group_.find(role) != nullptr; }

    // That tensor's last dimensions are the kernel's where it has four.
    void read_kernel(LoraRole role) {
        const StoredTensor * tensor = group_.find(role);
        const std::vector<int64_t> shape = tensor ? matrix_shape(*tensor) : std::vector<int64_t>{};
        if (shape.size() == 4) {
            form_.kh = shape[2];
            form_.kw = shape[3];
        }
    }

    void set(int64_t out, int64_t inputs) {
        form_.out = std::max(form_.out, out);
        form_.columns = std::max(form_.columns, inputs * std::max<int64_t>(1, form_.kh * form_.kw));
    }

    void read_low_rank() {
        read_kernel(LoraRole::down);
        if (has(LoraRole::mid)) {
            read_kernel(LoraRole::mid);
        }
        set(size(LoraRole::up, 0), size(LoraRole::down, 1));
        set(size(LoraRole::embedding_down, 1), size(LoraRole::embedding_up, 0));
    }

    void read_hadamard() {
        read_kernel(LoraRole::hada_t1);
        set(size(LoraRole::hada_w1_a, has(LoraRole::hada_t1) ? 1 : 0), size(LoraRole::hada_w1_b, 1));
    }

    void read_kronecker() {
        const bool left = has(LoraRole::lokr_w1), right = has(LoraRole::lokr_w2), core = has(LoraRole::lokr_t2);
        read_kernel(core ? LoraRole::lokr_t2 : LoraRole::lokr_w2);
        const int64_t o2 = right ? size(LoraRole::lokr_w2, 0) : size(LoraRole::lokr_w2_a, core ? 1 : 0);
        const int64_t i2 = right ? size(LoraRole::lokr_w2, 1) : size(LoraRole::lokr_w2_b, 1);
        set(size(left ? LoraRole::lokr_w1 : LoraRole::lokr_w1_a, 0) * o2,
            size(left ? LoraRole::lokr_w1 : LoraRole::lokr_w1_b, 1) * i2);
    }

    void read_others() {
        for (const LoraRole role : {LoraRole::diff, LoraRole::set_weight}) {
            const StoredTensor * tensor = group_.find(role);
            if (tensor && tensor->dims < 2) {
                set(count(tensor->ne), 0);
            } else if (tensor) {
                read_kernel(role);
                set(size(role, 0), size(role, 1));
            }
        }
        for (const LoraRole role : {LoraRole::diff_bias, LoraRole::up_bias}) {
            const StoredTensor * tensor = group_.find(role);
            set(tensor ? count(tensor->ne) : 0, 0);
        }
        if (has(LoraRole::b2)) { // of the two layouts the one whose rank is shared, see LoraBuilder::add_glora
            const bool is_new = size(LoraRole::b1, 1) == size(LoraRole::b2, 0);
            read_kernel(LoraRole::b2);
            set(size(is_new ? LoraRole::b1 : LoraRole::b2, 0), size(is_new ? LoraRole::b2 : LoraRole::b1, 1));
        }
        if (const StoredTensor * blocks = group_.find(LoraRole::oft_blocks)) {
            set(blocks->ne[0] * blocks->ne[2], 0);
        }
    }

    const LoraGroup & group_;
    LoraOutline::Form  form_;
};

std::optional<LoraTarget> first(const std::vector<LoraTarget> & targets) {
    return targets.empty() ? std::nullopt : std::optional<LoraTarget>(targets[0]);
}

} // namespace

LoraOutline::LoraOutline(const std::string & path, std::deque<Weight> weights)
    : weights_(std::move(weights)), names_(weights_), source_(path, report_, false) {
    for (const auto & [stem, group] : source_.groups) {
        Entry entry{&group, format_of(group), first(names_.find(stem, "weight")),
                    first(names_.find(stem, "bias")), false, StatedForm(group).read()};
        entry.absent = !entry.weight && !entry.bias && names_.lacks_component(stem);
        entries_.push_back(std::move(entry));
    }
}

std::vector<LoraModule> LoraOutline::read(size_t entry) const {
    LoraReport report = {};
    report.path = report_.path;
    LoraBuilder builder(names_, source_.config, source_.flags_ia3, report);
    std::vector<LoraModule> out;
    if (!builder.add(*entries_.at(entry).group, out)) {
        fail(Status::bad_file, "%s: %s means nothing in this model", report_.path.c_str(),
             printable(entries_[entry].group->stem).c_str());
    }
    if (!report.skipped.empty()) {
        fail(Status::bad_file, "%s: %s", report_.path.c_str(), report.skipped[0].c_str());
    }
    source_.file.verify_unchanged("it was read; ask for it again");
    return out;
}

std::vector<float> LoraOutline::delta(size_t entry, size_t module, const float * base, int64_t n_base,
                                      float multiplier) const {
    std::vector<LoraModule> modules = read(entry);
    if (module >= modules.size()) {
        fail(Status::bad_argument, "there is no module %zu of %s", module, entries_[entry].group->stem.c_str());
    }
    const LoraTarget target = modules[module].target;
    const MatrixShape shape = matrix_shape(*target.weight);
    const char * kind = lora_kind_name(modules[module].kind);
    if (base && n_base != target.rows * shape.columns()) {
        fail(Status::bad_argument, "the base of %s has %lld numbers, where %lld x %lld are wanted",
             printable(entries_[entry].group->stem).c_str(), static_cast<long long>(n_base),
             static_cast<long long>(target.rows), static_cast<long long>(shape.columns()));
    }
    const auto need_base = [&] {
        if (!base) {
            fail(Status::bad_argument, "%s: %s is a %s, which depends on the model's own weight; name the model",
                 report_.path.c_str(), printable(entries_[entry].group->stem).c_str(), kind);
        }
        return std::vector<float>(base, base + target.rows * shape.columns());
    };
    const Update update = make_update(std::move(modules[module]), need_base);
    if (update.needs_base()) {
        need_base();
    }
    return delta_of(update, base, multiplier);
}

} // namespace sd
