#include "nn/runner.h"

#include "core/error.h"
#include "core/memory.h"
#include "nn/adapters.h"
#include "nn/weights.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <optional>

namespace sd {

constexpr size_t base_nodes = 32768; // of a network without adapters, at the most

struct Runner::Plan {
    std::string network;
    Graph::Shapes shapes; // of all inputs but the strengths
    Shape strengths{};
    uint64_t adapters = 0, epoch = 0;
    size_t max_nodes = 0, scheduled = 0; // that the scheduler has room for
    ggml_context_ptr ctx;
    ggml_cgraph * nodes = nullptr;
    ggml_backend_sched_ptr sched;
    Graph::Shapes all_shapes; // the graph refers to them
    std::unique_ptr<Graph> graph;
};

namespace {

// Sees each node before and after it is computed.
struct Stopwatch {
    using Clock = std::chrono::steady_clock;

    Profile *           profile;
    const Graph *       graph;
    const std::string & network;
    Clock::time_point   begin;

    static bool after(ggml_tensor * node, bool before, void * self) {
        auto & watch = *static_cast<Stopwatch *>(self);
        if (!before) {
            const auto [what, flops] = watch.graph->describe(node);
            OperationCost & cost = (*watch.profile)[{watch.network, what}];
            ++cost.count;
            cost.seconds += std::chrono::duration<double>(Clock::now() - watch.begin).count();
            cost.flops += flops;
        }
        watch.begin = Clock::now();
        return true;
    }
};

Tensor read(Value value) {
    Tensor out(Graph::shape(value));
    ggml_backend_tensor_get(value, out.data.data(), 0, ggml_nbytes(value));
    return out;
}

// Sees what matrices are multiplied with as soon as it is computed: its memory is used again later.
class Watch {
  public:
    Watch(const Graph & graph, const Runner::Observer & observer) : observer_(observer) {
        for (const auto & [matrix, x] : graph.multiplied()) {
            if (x->type == GGML_TYPE_F32 && ggml_is_contiguous(x)) {
                matrices_[x].push_back(matrix);
            }
        }
    }

    // What is given from outside is no node.
    void see_inputs() const {
        for (const auto & [x, matrices] : matrices_) {
            if (x->op == GGML_OP_NONE) {
                see(x);
            }
        }
    }

    static bool after(ggml_tensor * node, bool before, void * self) {
        const auto & watch = *static_cast<const Watch *>(self);
        if (before) {
            return watch.matrices_.count(node) > 0;
        }
        watch.see(node);
        return true;
    }

  private:
    void see(Value x) const {
        const Tensor values = read(x);
        for (const Weight * matrix : matrices_.at(x)) {
            observer_(*matrix, values);
        }
    }

    const Runner::Observer &                      observer_;
    std::map<Value, std::vector<const Weight *>> matrices_;
};

} // namespace

static void write(Value value, const Tensor & tensor) {
    if (value->type == GGML_TYPE_I32) {
        const std::vector<int32_t> whole(tensor.data.begin(), tensor.data.end());
        ggml_backend_tensor_set(value, whole.data(), 0, ggml_nbytes(value));
    } else {
        ggml_backend_tensor_set(value, tensor.data.data(), 0, ggml_nbytes(value));
    }
}

Runner::Runner(Device & device, WeightStore & weights) : device_(device), weights_(weights) {}
Runner::~Runner() = default;

void Runner::adapt(const Adapters * adapters, Tensor strengths) {
    adapters_ = adapters && !adapters->by_weight.empty() ? adapters : nullptr;
    strengths_ = std::move(strengths);
}

static Graph::Shapes shapes_of(const Inputs & inputs) {
    Graph::Shapes shapes;
    for (const auto & [name, tensor] : inputs) {
        shapes[name] = tensor->ne;
    }
    return shapes;
}

size_t Runner::max_nodes() const { return base_nodes + (adapters_ ? adapters_->max_nodes() : 0); }

Runner::Plan & Runner::plan(const std::string & network, const Inputs & inputs,
                            const std::function<void(Graph &)> & build) {
    const uint64_t adapters = adapters_ ? adapters_->id : 0;
    const Shape strengths = adapters_ ? strengths_.ne : Shape{};
    Graph::Shapes shapes = shapes_of(inputs);
    const bool fits = plan_ && plan_->network == network && plan_->shapes == shapes && plan_->max_nodes >= max_nodes();
    if (fits && plan_->adapters == adapters && plan_->strengths == strengths && plan_->epoch == weights_.epoch()) {
        return *plan_;
    }
    // The same network with other adapters: nearly the same graph, in the buffers that are there.
    std::unique_ptr<Plan> plan = std::move(plan_);
    if (!fits) {
        plan.reset(); // its buffers make room
        plan = new_plan(network, shapes, max_nodes());
    }
    plan->adapters = adapters;
    plan->strengths = strengths;
    const size_t needed = measure(*plan, build);
    const size_t there = ggml_backend_sched_get_buffer_size(plan->sched.get(), device_.backends()[0]);
    ComponentSet components;
    for (const Weight * weight : plan->graph->weights()) {
        components.insert(weight->component);
    }
    weights_.need(components, needed > there ? needed - there : 0, network);
    build_into(*plan, build);
    plan_ = std::move(plan);
    return *plan_;
}

// ggml ends the process where it gets none.
static void check_address_space(size_t bytes, const std::string & network) {
    char * volatile some = new (std::nothrow) char[bytes]; // volatile: compilers leave out what is only given back
    const bool there_is = some != nullptr;
    delete[] some;
    if (!there_is) {
        fail(Status::out_of_memory, "%zu MB for the graph of '%s' could not be had", bytes >> 20, network.c_str());
    }
}

std::unique_ptr<Runner::Plan> Runner::new_plan(const std::string & network, const Graph::Shapes & shapes,
                                               size_t max_nodes) const {
    auto plan = std::make_unique<Plan>();
    plan->network = network;
    plan->shapes = shapes;
    plan->max_nodes = max_nodes;
    const size_t bytes = ggml_tensor_overhead() * max_nodes + ggml_graph_overhead_custom(max_nodes, false);
    check_address_space(bytes, network);
    plan->ctx.reset(ggml_init({bytes, nullptr, true}));
    return plan;
}

void Runner::append_nodes(Plan & plan, const std::function<void(Graph &)> & build) {
    plan.all_shapes = plan.shapes;
    if (adapters_) {
        plan.all_shapes["strengths"] = plan.strengths;
    }
    ggml_reset(plan.ctx.get());
    plan.nodes = ggml_new_graph_custom(plan.ctx.get(), plan.max_nodes, false);
    plan.graph = std::make_unique<Graph>(plan.ctx.get(), plan.nodes, device_, plan.all_shapes, adapters_);
    build(*plan.graph);
}

// With room for this graph, for it takes 20 KB of address space a node: two nodes for each, as any brings at most one tensor
// that is not computed, beside the weights.
void Runner::make_scheduler(Plan & plan) const {
    const size_t size = 2 * static_cast<size_t>(ggml_graph_n_nodes(plan.nodes)) + plan.graph->weights().size() + 64;
    if (plan.sched && plan.scheduled >= size) {
        return;
    }
    plan.sched.reset();
    plan.scheduled = size;
    check_address_space(2 * 64 * sizeof(ggml_tensor) * size, plan.network); // and as much for its tables
    auto backends = device_.backends();
    plan.sched.reset(
        ggml_backend_sched_new(backends.data(), nullptr, static_cast<int>(backends.size()), size, false, true));
    if (!plan.sched) {
        fail(Status::out_of_memory, "memory for the graph of '%s' could not be had", plan.network.c_str());
    }
}

// Bytes of activations on the device. The weights need not be there.
size_t Runner::measure(Plan & plan, const std::function<void(Graph &)> & build) {
    append_nodes(plan, build);
    make_scheduler(plan);
    std::vector<size_t> bytes(device_.backends().size());
    ggml_backend_sched_reserve_size(plan.sched.get(), plan.nodes, bytes.data());
    const size_t on_cpu = bytes.back(), available = available_memory(); // what the device lacks, or all of it
    if (!device_.is_cpu() && on_cpu > available) {
        fail(Status::out_of_memory,
             "the activations of '%s' need %zu MB beside the device, and %zu MB are free; try a smaller picture or batch, "
             "or vae_tile",
             plan.network.c_str(), on_cpu >> 20, available >> 20);
    }
    return bytes.front();
}

void Runner::build_into(Plan & plan, const std::function<void(Graph &)> & build) {
    plan.epoch = weights_.epoch();

    // Reserving first: the scheduler would take a graph of as many nodes of the same sizes for the former
    // one. It uses a graph up, for it puts copies between devices in the place of its nodes' sources.
    ggml_backend_sched * sched = plan.sched.get();
    append_nodes(plan, build);
    bool allocated = ggml_backend_sched_reserve(sched, plan.nodes);
    append_nodes(plan, build);
    allocated = allocated && ggml_backend_sched_alloc_graph(sched, plan.nodes);
    if (!allocated) {
        fail(Status::out_of_memory,
             "memory for the activations of '%s' could not be had on %s; try a smaller picture or batch",
             plan.network.c_str(), device_.name().c_str());
    }
}

std::map<std::string, Tensor> Runner::add_cost(const std::string & network, const Inputs & inputs,
                                               const std::function<void(Graph &)> & build) {
    NetworkCost cost{network, shapes_of(inputs), {}, 0, {}};
    const auto known = std::find_if(costs_->begin(), costs_->end(), [&](const NetworkCost & other) {
        return other.network == network && other.inputs == cost.inputs;
    });
    if (known != costs_->end()) { // one tile is like another
        cost = *known;
    } else {
        const std::unique_ptr<Plan> plan = new_plan(network, cost.inputs, max_nodes());
        plan->strengths = strengths_.ne;
        cost.activations = measure(*plan, build);
        cost.weights = plan->graph->weights();
        for (const auto & [name, value] : plan->graph->outputs()) {
            cost.outputs[name] = Graph::shape(value);
        }
    }
    std::map<std::string, Tensor> zeros;
    for (const auto & [name, ne] : cost.outputs) {
        zeros.emplace(name, Tensor(ne));
    }
    costs_->push_back(std::move(cost));
    return zeros;
}

std::map<std::string, Tensor> Runner::run(const std::string & network, const Inputs & inputs,
                                          const std::function<void(Graph &)> & build) {
    if (costs_) {
        return add_cost(network, inputs, build);
    }
    Plan & at = plan(network, inputs, build);
    for (const auto & [name, value] : at.graph->inputs()) {
        const auto given = inputs.find(name);
        write(value, given == inputs.end() ? strengths_ : *given->second);
    }
    for (const auto & constant : at.graph->constants()) {
        write(constant.value, constant.values); // a run may reuse their memory
    }

    if (!device_.keep_going()) { // a device other than the CPU does not ask while it computes
        fail(Status::cancelled, "stopped before '%s' ran", network.c_str());
    }
    Stopwatch stopwatch{profile_, at.graph.get(), network, Stopwatch::Clock::now()};
    ggml_backend_sched_set_eval_callback(at.sched.get(), profile_ ? Stopwatch::after : nullptr, &stopwatch);
    std::optional<Watch> watch;
    if (observer_ && !profile_) {
        watch.emplace(*at.graph, observer_);
        watch->see_inputs();
        ggml_backend_sched_set_eval_callback(at.sched.get(), Watch::after, &*watch);
    }
    switch (ggml_backend_sched_graph_compute(at.sched.get(), at.nodes)) {
    case GGML_STATUS_SUCCESS:
        break;
    case GGML_STATUS_ABORTED:
        fail(Status::cancelled, "stopped while '%s' was running", network.c_str());
    case GGML_STATUS_ALLOC_FAILED:
        fail(Status::out_of_memory, "memory to run '%s' could not be had; try a smaller picture or batch",
             network.c_str());
    default:
        fail(Status::internal, "ggml could not run '%s' on %s", network.c_str(), device_.name().c_str());
    }

    std::map<std::string, Tensor> outputs;
    for (const auto & [name, value] : at.graph->outputs()) {
        outputs.emplace(name, read(value));
    }
    return outputs;
}

void Runner::release() { plan_.reset(); }

} // namespace sd
