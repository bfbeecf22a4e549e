#include "lora/lora_pack.h"

#include "core/error.h"
#include "core/parallel.h"
#include "nn/device.h"

#include <algorithm>
#include <atomic>
#include <unordered_map>

namespace sd {

struct LoraPack::Fill {
    ggml_tensor * tensor;
    std::function<void(float *)> write; // every element
};

namespace {

uint64_t next_id() {
    static std::atomic<uint64_t> last{0};
    return ++last;
}

bool is_kernel(const Weight & weight) { return weight.ne[2] * weight.ne[3] > 1; }

} // namespace

LoraPack::LoraPack(std::vector<ActiveUpdate> active, const WeightStore & weights, const Device & device,
                   const LoraPack * former)
    : weights_(weights), device_(device), active_(std::move(active)),
      tensors_(
          7 *
          active_.size()) { // at most: a pair, two scales, a vector, and two factors of a Kronecker product
    adapters_.id = next_id();
    std::vector<const Weight *> order;
    std::unordered_map<const Weight *, Members> members;
    for (size_t i = 0; i < active_.size(); ++i) {
        const Weight * weight = active_[i].update->target.weight;
        Members & of = members[weight];
        if (of.empty()) {
            order.push_back(weight);
        }
        of.push_back(i);
    }
    std::vector<Fill> fills;
    for (const Weight * weight : order) {
        adapters_.by_weight[weight] = declare(*weight, members[weight], fills, former);
    }
    allocate(fills);
}

LoraPack::~LoraPack() = default;

int64_t LoraPack::add_entries(size_t member, int64_t n) {
    runs_.emplace_back(member, n);
    adapters_.entries += n;
    return adapters_.entries - n;
}

Adapter LoraPack::declare(const Weight & weight, const Members & members, std::vector<Fill> & fills,
                          const LoraPack * former) {
    Adapter adapter;
    const MatrixShape shape = matrix_shape(weight);
    if (shape.columns() == 1) {
        adapter.shift =
            declare_vectors(members, shape.rows, fills,
                            [this](const Update & update, float fixed) { return delta(update, fixed); });
        return adapter;
    }
    Members pairs, rows, columns;
    for (const size_t member : members) {
        const Update & update = *active_[member].update;
        if (update.rank > 0) {
            pairs.push_back(member);
        }
        if (!update.row_scale.empty()) {
            rows.push_back(member);
        }
        if (!update.input_scale.empty()) {
            columns.push_back(member);
        }
        if (!update.kronecker.a.empty()) {
            const Update::Kronecker & k = update.kronecker;
            ggml_tensor * a = tensors_.add({k.i1, k.o1, 1, 1});
            ggml_tensor * b = tensors_.add({k.i2, k.o2, 1, 1});
            fills.push_back({a, [&k](float * to) { std::copy(k.a.begin(), k.a.end(), to); }});
            fills.push_back({b, [&k](float * to) { std::copy(k.b.begin(), k.b.end(), to); }});
            adapter.kroneckers.push_back({a, b, add_entries(member, 1)});
        }
        if (update.dense.make) {
            declare_dense(weight, member, adapter, fills, former);
        }
    }
    declare_pair(weight, pairs, adapter, fills);
    adapter.rows = declare_vectors(rows, shape.rows, fills,
                                   [](const Update & update, float) { return update.row_scale; });
    adapter.columns = declare_vectors(columns, shape.inputs, fills,
                                      [](const Update & update, float) { return update.input_scale; });
    return adapter;
}

void LoraPack::declare_pair(const Weight & weight, const Members & members, Adapter & adapter,
                            std::vector<Fill> & fills) {
    if (members.empty()) {
        return;
    }
    MatrixShape shape = matrix_shape(weight);
    int64_t rank = 0;
    adapter.strengths = adapters_.entries;
    std::vector<const Update *> updates;
    for (const size_t member : members) {
        updates.push_back(active_[member].update);
        shape.inputs = std::max(shape.inputs, updates.back()->shape.inputs); // control LoRAs take more
        rank += updates.back()->rank;
        add_entries(member, updates.back()->rank);
    }
    const Shape down = weight.table        ? Shape{rank, shape.inputs, 1, 1}
                       : is_kernel(weight) ? Shape{weight.ne[0], weight.ne[1], weight.ne[2], rank}
                                           : Shape{shape.inputs, rank, 1, 1};
    adapter.down = tensors_.add(down);
    adapter.up = tensors_.add({rank, shape.rows, 1, 1});
    fills.push_back({adapter.down, [updates, rank, shape, is_table = weight.table](float * to) {
                         int64_t first = 0;
                         for (const Update * update : updates) {
                             for (size_t i = 0; is_table && i < update->down.size(); ++i) {
                                 const auto at = static_cast<int64_t>(i);
                                 to[at % shape.inputs * rank + first + at / shape.inputs] = update->down[i];
                             }
                             const int64_t columns = update->shape.columns();
                             for (int64_t row = 0; !is_table && row < update->rank; ++row) {
                                 float * at = to + (first + row) * shape.columns();
                                 std::copy_n(update->down.data() + row * columns, columns, at);
                                 std::fill(at + columns, at + shape.columns(), 0.0f);
                             }
                             first += update->rank;
                         }
                     }});
    fills.push_back(
        {adapter.up, [updates, rank, shape](float * to) {
             int64_t first = 0;
             for (const Update * update : updates) {
                 const int64_t from = update->target.first_row, until = from + update->target.rows;
                 for (int64_t row = 0; row < shape.rows; ++row) {
                     float * at = to + row * rank + first;
                     if (row >= from && row < until) {
                         std::copy_n(update->up.data() + (row - from) * update->rank, update->rank, at);
                     } else { // of a fused weight: another part's
                         std::fill_n(at, update->rank, 0.0f);
                     }
                 }
                 first += update->rank;
             }
         }});
}

Adapter::Vectors
LoraPack::declare_vectors(const Members & members, int64_t n, std::vector<Fill> & fills,
                          const std::function<std::vector<float>(const Update &, float)> & values) {
    Adapter::Vectors out;
    if (members.empty()) {
        return out;
    }
    const auto count = static_cast<int64_t>(members.size());
    out.values = tensors_.add({count, n, 1, 1});
    out.strengths = adapters_.entries;
    std::vector<ActiveUpdate> those;
    for (const size_t member : members) {
        those.push_back(active_[member]);
        add_entries(member, 1);
    }
    fills.push_back({out.values, [those, count, n, values](float * to) {
                         std::fill_n(to, count * n, 0.0f);
                         for (size_t e = 0; e < those.size(); ++e) {
                             const Update & update = *those[e].update;
                             const std::vector<float> column = values(update, those[e].fixed);
                             // Scales of inputs cover them all; anything else covers the target's rows.
                             const int64_t first = update.input_scale.empty() ? update.target.first_row : 0;
                             for (size_t i = 0; i < column.size(); ++i) {
                                 to[(first + static_cast<int64_t>(i)) * count + static_cast<int64_t>(e)] =
                                     column[i];
                             }
                         }
                     }});
    return out;
}

void LoraPack::declare_dense(const Weight & weight, size_t member, Adapter & adapter,
                             std::vector<Fill> & fills, const LoraPack * former) {
    const ActiveUpdate & active = active_[member];
    const auto key = std::make_pair(active.update, active.fixed);
    const auto lent = former ? former->dense_.find(key) : dense_.end();
    if (former && lent != former->dense_.end()) {
        dense_[key] = lent->second;
    } else {
        auto memory = std::make_shared<DeviceTensors>(1);
        ggml_tensor * made = memory->add(weight.ne);
        dense_[key] = {std::move(memory), made};
        fills.push_back({made, [this, active, size = count(weight.ne)](float * to) {
                             const Update & update = *active.update;
                             const std::vector<float> base =
                                 update.dense.needs_base ? base_rows(update) : std::vector<float>();
                             const std::vector<float> change =
                                 update.dense.make(base.data(), update.dense.linear ? 1.0f : active.fixed);
                             std::fill_n(to, size, 0.0f);
                             std::copy(change.begin(), change.end(),
                                       to + update.target.first_row * update.shape.columns());
                         }});
    }
    adapter.dense.push_back({dense_[key].delta, add_entries(member, 1)});
}

std::vector<float> LoraPack::base_rows(const Update & update) const {
    const int64_t columns = update.shape.columns();
    std::vector<float> rows(static_cast<size_t>(update.target.rows * columns));
    weights_.read_base(*update.target.weight, update.target.first_row * columns, update.target.rows * columns,
                       rows.data());
    return rows;
}

std::vector<float> LoraPack::delta(const Update & update, float fixed) const {
    const std::vector<float> base = update.needs_base() ? base_rows(update) : std::vector<float>();
    return delta_of(update, base.data(), update.is_linear() ? 1.0f : fixed);
}

void LoraPack::allocate(const std::vector<Fill> & fills) {
    size_t bytes = tensors_.bytes();
    for (const auto & [key, dense] : dense_) {
        bytes += dense.memory->is_allocated() ? 0 : dense.memory->bytes();
    }
    const size_t free = device_.memory_free();
    if (free > 0 && bytes > free) {
        fail(Status::out_of_memory,
             "these LoRAs need %zu MB on %s, which has %zu MB free; name fewer of them", bytes >> 20,
             device_.name().c_str(), free >> 20);
    }
    tensors_.allocate(device_);
    for (auto & [key, dense] : dense_) {
        dense.memory->allocate(device_);
    }
    parallel_for(device_.threads(), fills.size(),
                 [&](size_t i) { DeviceTensors::fill(fills[i].tensor, fills[i].write); });
}

void LoraPack::strengths(const std::function<float(const ActiveUpdate &)> & of, float * to) const {
    for (const auto & [member, n] : runs_) {
        to = std::fill_n(to, n, of(active_[member]));
    }
}

size_t LoraPack::bytes() const {
    size_t bytes = tensors_.bytes();
    for (const auto & [key, dense] : dense_) {
        bytes += dense.memory->bytes();
    }
    return bytes;
}

} // namespace sd
