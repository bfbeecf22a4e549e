// A family: how networks, text encoders and an autoencoder join into something that paints. One file each.
#pragma once

#include "nn/graph.h"
#include "nn/runner.h"
#include "nn/weights.h"
#include "sampling/schedule.h"
#include "text/clip_chunks.h"

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace sd {

// What a request takes where it says nothing.
struct Defaults {
    int          steps;
    float        cfg_scale;
    const char * sampler;
    const char * scheduler;
    int          clip_skip;
    float        guidance = 0; // what a network distilled for guidance is told; 0: it takes none
    float        strength = 0.75f;
};

// What the denoiser's output means: the noise, v, or of a rectified flow the noise minus the clean latent.
enum class Prediction { eps, v, flow };

// What the denoiser sees beside the noisy latent, in this order.
enum class ExtraInput {
    none,
    inpainting, // the mask, and the picture with grey where it is to repaint
    pix2pix,    // the picture
    fill,       // the picture with grey where it is to repaint, and the mask's pixels, those of a cell as channels
    control,    // a picture of edges or depths
};

struct LatentFormat {
    int64_t channels;
    int     reduction; // pixels a cell is wide
    float   scale;     // the denoiser's latents are the autoencoder's, less `shift`, times this
    float   shift = 0;
};

using Prompt = std::vector<Span>;

// What SDXL is told of a picture: that it is a cut, from this corner, of one that had the original size before it was
// scaled, and has the target size now. Pixels.
struct PictureSizes {
    int original_width = 0, original_height = 0;
    int crop_top = -1, crop_left = -1;
    int target_width = 0, target_height = 0;
};

// Inputs of the denoiser that say what to paint, by name.
struct Conditioning {
    std::map<std::string, Tensor> tokens;  // [width, tokens] of one image, [width, tokens, N] of several
    std::map<std::string, Tensor> vectors; // [width], or [width, N]: of an image as a whole
};

// A word that stands for vectors of its own: for each text encoder [width, vectors], as many for each.
struct LearnedText {
    std::string         name;
    std::vector<Tensor> vectors;
};

class Pipeline {
  public:
    virtual ~Pipeline() = default;

    virtual Defaults      defaults() const = 0;
    virtual Prediction    prediction() const = 0;
    virtual bool          is_zero_snr() const { return false; } // whether the highest noise level is noise alone
    virtual LatentFormat  latent_format() const = 0;
    // For latents [w, h, ...]; a `shift` above 0 replaces a flow's own.
    virtual NoiseSchedule noise_schedule(const Shape & latent, double shift) const = 0;
    virtual int           input_channels() const = 0; // of the denoiser
    virtual ExtraInput    extra_input() const {
        const int64_t extra = input_channels() - latent_format().channels;
        return extra == 0 ? ExtraInput::none : extra == latent_format().channels ? ExtraInput::pix2pix : ExtraInput::inpainting;
    }
    virtual bool          takes_reference() const { return false; } // whether denoise() may have the input "reference"
    virtual int           redux_size() const { return 0; } // pixels of a side of what look_at() takes; 0: there is none
    virtual int           size_multiple() const = 0;  // of width and height, in pixels
    virtual int           native_size() const = 0;    // pixels of a side that the denoiser was trained at

    // How many chunks a prompt fills, and its conditioning, filled up with empty text to `chunks`.
    virtual int          count_chunks(const Prompt & prompt) const = 0;
    virtual Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const = 0;
    virtual int          count_tokens(const std::string & text) const = 0;
    // What of a prompt no text encoder has room for, as a sentence; "" where all of it is read.
    virtual std::string unread(const Prompt & prompt) const {
        static_cast<void>(prompt);
        return "";
    }

    // Makes exactly these words stand for vectors. Throws Error(unsupported / bad_argument), and nothing changes, where
    // the family has no such words or one does not fit its text encoders.
    virtual void learn(const std::vector<LearnedText> & words);

    // Whether the denoiser is told sizes, and what it sees of them whatever the prompt.
    virtual bool         takes_sizes() const { return false; }
    virtual Conditioning describe(const PictureSizes &) const { return {}; }

    // Graphs of the networks. Inputs: "ids" [n, chunks], of a second encoder "ids_2" and "ends" [chunks]; "latent"
    // [w, h, C, N], "time" [N], "guidance" [N] where defaults() have one, the conditioning, and, where takes_reference(),
    // "reference" [w, h, C, N], a clean latent of any size; "image" [W, H, 3, N]; "latent" [w, h, C, N].
    // The text's outputs: "states" [width, n, chunks], and "pooled" [width, chunks] where the family has it.
    virtual void  text(Graph & g, int clip_skip) const = 0;
    virtual Value denoise(Graph & g) const = 0;
    virtual Value encode_image(Graph & g) const = 0; // mean and log-variance, unscaled
    virtual Value decode_latent(Graph & g) const = 0;
    // Input "image" [side, side, 3, 1] -> tokens that stand behind the text's [width, n, 1]. Only where redux_size() > 0.
    virtual Value look_at(Graph & g) const {
        static_cast<void>(g);
        return nullptr;
    }
};

struct OpenOptions {
    std::string data_dir;   // vocabularies
    std::string prediction; // "eps", "v" or "": as the file says
    std::optional<bool> zero_snr; // whether the highest noise level is noise alone; none: as the file says
};

struct Family {
    const char * name;
    bool (*recognises)(const Checkpoint &);
    std::unique_ptr<Pipeline> (*open)(WeightStore &, const OpenOptions &);

    std::string written() const; // as people write it: "SDXL"
};

const std::vector<const Family *> & families();

// The family of a checkpoint; throws Error(unsupported) where no one recognises it.
const Family & recognise(const Checkpoint & checkpoint);

} // namespace sd
