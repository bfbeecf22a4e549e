// Running graphs: builds them once per shape, keeps their buffers, writes inputs and reads outputs.
#pragma once

#include "core/tensor.h"
#include "nn/device.h"
#include "nn/graph.h"
#include "nn/profile.h"

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace sd {

struct Weight;
class WeightStore;

using Inputs = std::map<std::string, const Tensor *>;

class Runner {
  public:
    // `weights` are those that graphs refer to: a graph is built anew where one of them has moved.
    Runner(Device & device, const WeightStore & weights);
    ~Runner();

    Device & device() { return device_; }

    // Runs the graph that `build` appends for inputs of these shapes, and returns its outputs by name. The
    // graph is kept and reused while `network`, the shapes of the inputs and the adapters stay the same; its
    // buffers are kept as long as the shapes do.
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

    // Gives back the memory of all kept graphs of other networks than this.
    void keep_only(const std::string & network);

    // Bytes of activations that the kept graphs hold.
    size_t buffer_bytes() const;

  private:
    struct Plan;
    Plan & plan(const std::string & network, const Inputs & inputs,
                const std::function<void(Graph &)> & build);
    void append_nodes(Plan & plan, const std::function<void(Graph &)> & build);
    void check_memory(Plan & plan, const std::function<void(Graph &)> & build);
    void build_into(Plan & plan, const std::function<void(Graph &)> & build);

    Device & device_;
    const WeightStore & weights_;
    const Adapters * adapters_ = nullptr;
    Tensor strengths_;
    Profile * profile_ = nullptr;
    Observer observer_;
    std::list<std::unique_ptr<Plan>> plans_;
};

} // namespace sd
