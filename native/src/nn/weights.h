// Declaring weights, and keeping them resident. A layer's line names its place once, in the spellings of
// single files and of diffusers folders; loading, checking, errors, the inventory and the table by which
// adapters find their weight all come from that line.
#pragma once

#include "checkpoint/checkpoint.h"
#include "core/log.h"
#include "core/tensor.h"
#include "nn/residency.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

struct ggml_backend_buffer;
struct ggml_context;
struct ggml_tensor;

namespace sd {

class Device;

// Rows of a fused weight that are a weight of their own in diffusers' layout.
struct WeightPart {
    std::string diffusers; // "transformer.transformer_blocks.0.attn.to_q.weight"
    int64_t     first_row, rows;
    bool        swap_halves = false; // diffusers has the two halves of the rows the other way round
};

// Rows of a stored tensor.
struct StoredRows {
    const StoredTensor * tensor;
    int64_t              first, rows;
};

// One declared weight. Its address is its identity for as long as the store lives.
struct Weight {
    std::string         name;      // "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    std::string         diffusers; // "unet.down_blocks.0.resnets.0.conv1.weight"
    Shape               ne;        // as declared, ggml's order
    const StoredTensor * stored = nullptr; // null: optional and absent; the first of `pieces`
    ggml_tensor *       tensor = nullptr;  // after WeightStore::load; without data while its component is away
    ggml_tensor *       loaded = nullptr;  // the same, but where adapters have changed it: what it was
    size_t              component = 0;     // of the store
    bool                copied = false;    // to the device's memory; else it is used where it lies in the file
    std::vector<WeightPart> parts = {};    // where it is fused; `diffusers` is empty then
    bool                table = false;     // of embeddings: its rows are looked up, not multiplied
    bool                wide = false;      // its products go beyond f16, which it is not kept in then
    bool                transposed = false; // the file has rows and columns the other way round
    std::vector<StoredRows> pieces = {};   // where the file has its parts apart: one below the other
};

// How a loaded weight lies in memory: "f16", "q8_0", ...
const char * resident_type_name(const Weight & weight);

class WeightStore;

// A place in a network, spelled in every naming convention at once.
class Scope {
  public:
    Scope(WeightStore * store, size_t component, std::string name, std::string diffusers)
        : store_(store), component_(component), name_(std::move(name)), diffusers_(std::move(diffusers)) {}

    Scope at(const std::string & name) const { return at(name, name); }
    Scope at(const std::string & name, const std::string & diffusers) const;

    // Declares one weight. A missing or misshapen one is remembered, so that WeightStore::check() can report
    // all of them together. Never null.
    const Weight * required(const char * leaf, const Shape & ne) const;
    // The same, but null where the files have none.
    const Weight * optional(const char * leaf, const Shape & ne) const;
    // A table of embeddings.
    const Weight * table(const char * leaf, int64_t width, int64_t rows) const;
    // One weight here, and in diffusers' layout several below this place, by leaf: resident in one piece.
    const Weight * fused(const char * leaf, const Shape & ne, std::vector<WeightPart> parts) const;
    // A matrix [in, out] that diffusers' layout has below this place, and single files as [out, in] right here.
    const Weight * turned(const Shape & ne) const;

    // The same place, whose weights below it are declared `wide`.
    Scope wide() const;

    // Looks without declaring: the stored shape, or null.
    const StoredTensor * find(const char * leaf = "weight") const;
    bool                 has(const char * leaf = "weight") const { return find(leaf) != nullptr; }

    const std::string & name() const { return name_; }
    const std::string & diffusers() const { return diffusers_; }

  private:
    Weight        weight(const char * leaf, const Shape & ne) const;

    WeightStore * store_;
    size_t        component_;
    std::string   name_, diffusers_;
    bool          wide_ = false;
};

class WeightStore {
  public:
    explicit WeightStore(Checkpoint checkpoint);
    ~WeightStore();
    WeightStore(const WeightStore &) = delete;
    WeightStore & operator=(const WeightStore &) = delete;

    const Checkpoint & checkpoint() const { return checkpoint_; }

    // The place of a network, whose weights are a component.
    Scope root(const std::string & name, const std::string & diffusers);

    // Throws one Error that tells of every missing and misshapen weight.
    void check() const;

    // Throws where a file holds a tensor below one of these paths that no layer declared: the network is of
    // another architecture then, and would paint something else.
    void check_all_used(const std::vector<std::string> & paths) const;

    // ---- being in memory, see weight_residency.cpp. Where the device reads host memory and the type needs no conversion,
    // the mapping of the file is the resident form; all else is copied to the device when a network has need of it.

    // Decides the resident form of all declared weights, and brings none in. No more than `limit` bytes shall be taken by
    // weights and activations at a time; 0: what the device has.
    void load(const Device & device, size_t limit = 0, const Log & log = {});

    const std::vector<Component> & components() const { return components_; }

    // Brings these in, with room for so many bytes of activations; others leave where it takes that. `what` needs them, in
    // messages. Throws Error(out_of_memory / cancelled).
    void need(const ComponentSet & wanted, size_t activations, const std::string & what);

    // Lets components leave where `bytes` more have no room on the device.
    void make_room(size_t bytes) { make_room({}, bytes); }

    // Bytes that more components and activations may take.
    size_t room() const;

    // Of a weight as it was loaded; and whether that is the mapped file itself.
    size_t bytes(const Weight & weight) const;
    bool   lies_in_file(const Weight & weight) const { return !weight.copied; }

    const std::deque<Weight> & weights() const { return weights_; }
    size_t                     resident_bytes() const;

    // A hash of the names, types, shapes and resident bytes of all weights: 64 hexadecimal digits.
    std::string fingerprint() const;

    // ---- rewriting weights, see weight_rewrites.cpp. Elements are counted in the order of memory; ranges begin
    // and end with a row. Reading and writing may go on in several threads, on ranges that do not overlap.

    // Elements [first, first + n) as the files have them, or as they are resident now.
    void read_base(const Weight & weight, int64_t first, int64_t n, float * to) const;
    void read(const Weight & weight, int64_t first, int64_t n, float * to) const;

    // Makes the weight one that may be written, of the type it was loaded in; a quantised one of f16, unless
    // `requantise` asks for its own type again. Where that takes another tensor its contents are undefined until
    // they are written.
    void make_writable(const Weight & weight, bool requantise = false);
    void write(const Weight & weight, int64_t first, int64_t n, const float * from);

    // Of the type that make_writable() makes: the largest number that it holds, and whole rows as it would hold them.
    float largest_value(const Weight & weight, bool requantise) const;
    void  round(const Weight & weight, bool requantise, std::vector<float> & rows) const;

    // Back to what load() made resident, bit for bit.
    void restore(const Weight & weight);

    // Another number whenever the tensor of some weight is another one, so that graphs are out of date.
    uint64_t epoch() const { return epoch_; }

  private:
    friend class Scope;
    const Weight * declare(const Weight & weight, const StoredTensor * stored, bool required);
    bool           takes(Weight & weight, const StoredTensor & stored, Shape ne);

    std::vector<uint8_t> loaded_bytes(const Weight & weight) const;  // what load() decided
    std::vector<uint8_t> current_bytes(const Weight & weight) const; // with what adapters have written
    void                 convert(const Weight & weight) const;
    void                 make_room(const ComponentSet & staying, size_t bytes);
    void                 bring(size_t component, const ComponentSet & staying);
    void                 fill(size_t component, const ComponentSet & staying);
    void                 send_away(size_t component);
    void                 clear(size_t component);
    void                 forget_pages(const Weight & weight) const;

    // Of a component that leaves, and of one that has come.
    void keep_rewrites(size_t component);
    void return_rewrites(size_t component);
    void free_privates(size_t component);

    ggml_backend_buffer * nowhere() const; // of weights that are away: a buffer without memory

    // Where a weight's bytes lie in the files: rows in the order of memory.
    struct Piece {
        DType           type;
        const uint8_t * data;
        int64_t         elements;
        float           scale;
        size_t          bytes() const;
    };
    std::vector<Piece> pieces(const Weight & weight) const;
    int32_t        writable_type(const Weight & weight, bool requantise) const; // ggml's number
    void           make_private(const Weight & weight, int32_t ggml_type);

    Checkpoint               checkpoint_;
    std::deque<Weight>       weights_; // never moves an element
    std::vector<std::string> missing_, misshapen_;

    std::vector<Component>   components_;

    const Device *           device_ = nullptr; // after load()
    size_t                   limit_ = 0;
    Log                      log_;
    uint64_t                 epoch_ = 0, runs_ = 0;

    struct Resident;
    std::unique_ptr<Resident> resident_;
    struct Rewrites;
    std::shared_ptr<Rewrites> rewrites_; // known to weight_rewrites.cpp alone
};

} // namespace sd
