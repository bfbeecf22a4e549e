// Running graphs: builds them once per shape, keeps their buffers, writes inputs and reads outputs.
#pragma once

#include "core/tensor.h"
#include "nn/device.h"
#include "nn/graph.h"
#include "nn/profile.h"

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace sd {

struct Weight;
class WeightStore;

using Inputs = std::map<std::string, const Tensor *>;

// What a run of a network takes of the device's memory.
struct NetworkCost {
    std::string              network;
    Graph::Shapes            inputs, outputs;
    size_t                   activations; // bytes
    std::set<const Weight *> weights;
};

class Runner {
  public:
    // `weights` are those that graphs refer to: a graph is built anew where one of them has moved.
    Runner(Device & device, WeightStore & weights);
    ~Runner();

    Device & device() { return device_; }

    // Runs the graph that `build` appends for inputs of these shapes, and returns its outputs by name. Its weights are
    // brought into memory before. The graph is kept and reused while `network`, the shapes of the inputs and the adapters
    // stay the same; its buffers are kept as long as the shapes do, and are given back before another network runs.
    std::map<std::string, Tensor> run(const std::string & network, const Inputs & inputs,
                                      const std::function<void(Graph &)> & build);

    // What acts on the weights in the runs that follow, and how strongly: [entries, images], or [entries, 1]
    // for all images. Null: nothing. The adapters must outlive those runs.
    void adapt(const Adapters * adapters, Tensor strengths = {});

    // Adds to `profile` what every operation of the runs that follow takes; they are slower, for each is waited for. Null:
    // no longer.
    void set_profile(Profile * profile) { profile_ = profile; }

    // Called in the runs that follow with each matrix and what it is multiplied with, [in, ...]; they are slower. Null: no
    // longer. Where a profile is taken as well, that comes first.
    using Observer = std::function<void(const Weight & matrix, const Tensor & x)>;
    void set_observer(Observer observer) { observer_ = std::move(observer); }

    // The runs that follow compute nothing: they only add to `costs` what they would take, and give zeros. Null: no longer.
    void set_measuring(std::vector<NetworkCost> * costs) { costs_ = costs; }

    // Gives back the memory of the kept graph.
    void release();

  private:
    struct Plan;
    Plan & plan(const std::string & network, const Inputs & inputs,
                const std::function<void(Graph &)> & build);
    std::unique_ptr<Plan> new_plan(const std::string & network, const Graph::Shapes & shapes, size_t max_nodes) const;
    size_t max_nodes() const;
    void append_nodes(Plan & plan, const std::function<void(Graph &)> & build);
    void make_scheduler(Plan & plan) const;
    size_t measure(Plan & plan, const std::function<void(Graph &)> & build);
    void build_into(Plan & plan, const std::function<void(Graph &)> & build);
    std::map<std::string, Tensor> add_cost(const std::string & network, const Inputs & inputs,
                                           const std::function<void(Graph &)> & build);

    Device & device_;
    WeightStore & weights_;
    const Adapters * adapters_ = nullptr;
    Tensor strengths_;
    Profile * profile_ = nullptr;
    Observer observer_;
    std::vector<NetworkCost> * costs_ = nullptr;
    std::unique_ptr<Plan> plan_; // of the network that ran last
};

} // namespace sd
