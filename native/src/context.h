// A model in memory, ready to paint: owns weights and graphs. generate() reads as the algorithm.
#pragma once

#include "core/log.h"
#include "families/family.h"
#include "lora/lora_engine.h"
#include "nn/device.h"
#include "nn/estimate.h"
#include "nn/runner.h"
#include "nn/weights.h"

#include <atomic>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace sd {

struct OpenParams {
    std::string                model;
    std::vector<ComponentFile> components;
    std::string                data_dir, backend, prediction, precision;
    std::optional<bool>        zero_snr; // see OpenOptions
    int                        threads = 0;
    bool                       in_ram = false; // the files, which may change or vanish then
    size_t                     memory_limit = 0; // bytes of weights and activations on the device; 0: what it has
    LoraOptions                loras;
    Log                        log;
};

struct Request {
    std::vector<Prompt>                         prompts, negative_prompts; // one, or one per image
    LoraState                                   loras;
    int                                         width = 0, height = 0, steps = 0;
    PictureSizes                                sizes, negative_sizes; // 0, of a crop below 0: see complete_sizes()
    float                                       cfg_scale = 1;
    float                                       guidance_rescale = 0;
    float                                       guidance = -1; // below 0: the family's own
    float                                       shift = 0;     // of a flow; 0: the family's own
    uint64_t                                    seed = 0;
    int                                         batch_size = 1;
    std::string                                 sampler, scheduler, rng; // "": the default
    float                                       eta = -1;
    int                                         clip_skip = 0;
    const uint8_t *                             init_image = nullptr; // width * height RGB
    float                                       strength = 1;
    const uint8_t *                             mask = nullptr; // width * height grey
    const uint8_t *                             control_image = nullptr; // width * height RGB
    const uint8_t *                             reference_image = nullptr; // reference_width * reference_height RGB
    int                                         reference_width = 0, reference_height = 0;
    const uint8_t *                             redux_image = nullptr; // redux_size() * redux_size() RGB
    float                                       redux_strength = 1;
    int                                         vae_tile = 0;
    std::function<bool(int step, int steps)>    on_step;
    std::function<bool()>                       keep_going;
};

class Context {
  public:
    explicit Context(const OpenParams & params);

    const Pipeline &    pipeline() const { return *pipeline_; }
    const Family &      family() const { return *family_; }
    const Device &      device() const { return device_; }
    const WeightStore & weights() const { return weights_; }

    // Paints batch_size images one after another into `rgb`.
    void generate(Request request, uint8_t * rgb);

    // What generate() would take, with the LoRAs that are in force, before it reads any weight.
    MemoryEstimate estimate(Request request);

    // Inside on_step: one pixel per latent cell of image `image`.
    void preview(int image, uint8_t * rgb);

    std::string fingerprint();
    int         count_tokens(const std::string & text) const;
    void        learn(const std::vector<LearnedText> & words); // exactly these, see Pipeline::learn
    Tensor      encode_text(const std::string & text);         // [width, tokens], for tests

    // What generate() does first, with what its prompts name; see LoraEngine.
    void        apply_loras(const LoraState & wanted);
    void        reset_loras();
    double      lora_drift();
    LoraReport  inspect_lora(const std::string & path);
    LoraEngine & loras() { return loras_; }
    const LoraEngine & loras() const { return loras_; }

    // What the last picture was decoded from; empty before the first.
    const Tensor & last_latent() const { return last_latent_; }

    // Where the time of the pictures that follow goes; begins anew.
    void            set_profiling(bool on);
    const Profile & profile() const { return profile_; }

    // Of what each matrix was multiplied with since set_observing(true): the sum of squares of each column.
    struct Importance {
        std::vector<double> sums;
        int64_t             rows = 0;
    };
    void                                      set_observing(bool on);
    const std::map<std::string, Importance> & importance() const { return importance_; }

    // Runs one network alone; see sdcpp_probe.h.
    Tensor probe(const std::string & network, const std::map<std::string, Tensor> & inputs);

  private:
    friend class Claim;

    struct Latents { // of a whole batch, [w, h, channels, images] each
        Shape                 ne;
        std::optional<Tensor> init;  // the picture to start from, one for all images
        std::optional<Tensor> mask;  // [w, h, 1, 1], 1 where to repaint
        std::optional<Tensor> extra; // input channels behind the latent's own
    };

    void         paint(const Request & request, uint8_t * rgb);
    void         complete(Request & request) const;
    void         complete_sizes(Request & request) const;
    void         check_control(const Request & request) const;
    void         hint_at_settings(const Request & request);
    LoraFile     read_with_settings(const std::string & lora) const;
    void         warn_unread(const Request & request, bool guided) const;
    Conditioning condition(const Request & request, bool guided);
    void         append_redux(const Request & request, Conditioning & all);
    Conditioning encode_prompt(const Prompt & prompt, size_t image, int clip_skip, int chunks);
    Latents      start(const Request & request);
    std::optional<Tensor> extra_channels(const Request & request, std::vector<float> picture,
                                         const std::optional<Tensor> & mask);
    std::optional<Tensor> encode_reference(const Request & request, int runs);
    // Pixels of a tile's side that pictures of this size go through the autoencoder in; 0: whole.
    static int   tile_for(const Request & request, int width, int height);
    Tensor       encode_picture(const std::vector<float> & rgb, int width, int height, int tile);
    void         decode(const Request & request, const Tensor & latent, uint8_t * rgb);

    Log                       log_;
    std::atomic<bool>         busy_{false};
    Device                    device_;
    WeightStore               weights_;
    const Family *            family_;
    std::unique_ptr<Pipeline> pipeline_;
    Runner                    runner_;
    LoraNames                 lora_names_;
    LoraEngine                loras_;

    struct Encoded {
        Prompt       prompt;
        std::string  loras; // what changed the text encoder
        int          clip_skip, chunks;
        Conditioning conditioning;
    };
    std::list<Encoded> encoded_; // the newest first

    std::set<std::string>      hinted_; // paths of LoRAs whose settings were told
    Profile                    profile_;
    std::map<std::string, Importance> importance_; // by the names of matrices
    Tensor                     last_latent_;
    const std::vector<float> * estimate_ = nullptr; // of the clean latent, while on_step runs
    Shape                      estimate_ne_{};
    std::vector<float>         preview_map_; // [channels + 1, 3], fitted at the first preview
};

} // namespace sd
