/*
 * sdcpp_probe.h: staging for tests and tools, not part of the public surface and free to change.
 * Runs one part of the engine alone. Statuses, errors and threads as in sdcpp.h.
 */
#ifndef SDCPP_PROBE_H
#define SDCPP_PROBE_H

#include "sdcpp.h"

#ifdef __cplusplus
extern "C" {
#endif

// Floats on the host; the fastest dimension first ([W, H, C, N]), unused dimensions 1.
typedef struct sd_tensor {
    const char * name; // of an input
    int64_t      ne[4];
    float *      data;
} sd_tensor;

// Receives a result; `data` is valid during the call only.
typedef void (*sd_receive)(const sd_tensor * result, void * user);

// Runs one network on the given inputs:
//   "text"        ids [n, chunks] (whole numbers), clip_skip [1]       -> [width, n, chunks]
//                 of two encoders also ids_2, and ends [chunks]: where each chunk ends, counted through all
//                 of SD3 and FLUX one encoder at a time: ids, ids_2 or t5_ids
//   "pooled"      the same                                             -> [width, chunks]
//   "denoise"     latent [W, H, C, N], time [N], text [width, n, N]    -> what the network predicts
//                 of SDXL also pooled [width, N] and sizes [6, N]; of SD3 and FLUX pooled, and guidance [N] where
//                 the model takes one
//   "vae_encode"  image [W, H, 3, N] in -1..1                          -> mean and log-variance [w, h, 2C, N]
//   "vae_decode"  latent [w, h, C, N], unscaled                        -> [W, H, 3, N]
//   "redux"       image [side, side, 3, N] of FLUX with Redux          -> [width, n, N]
SD_API sd_status sd_probe_run(sd_ctx * ctx, const char * network, const sd_tensor * inputs, int n_inputs,
                              sd_receive receive, void * user);

// The latent that the last picture was decoded from: [w, h, C, images].
SD_API sd_status sd_probe_latent(sd_ctx * ctx, sd_receive receive, void * user);

// What one kind of operation took in all pictures since sd_probe_profile(ctx, true).
typedef struct sd_operation_cost {
    const char * network;   // "text1", "denoise", "vae_decode", ...
    const char * operation; // "convolution 3x3 320 -> 320, 8192 rows, f16"
    int64_t      count;
    double       seconds;
    double       flops; // additions and multiplications; 0 where none to speak of
} sd_operation_cost;

// Starts measuring, or stops. Pictures take longer meanwhile.
SD_API sd_status sd_probe_profile(sd_ctx * ctx, bool on);

// Fills `cost` and returns true, or returns false past the end. Strings live until the next picture.
SD_API bool sd_probe_operation(const sd_ctx * ctx, int index, sd_operation_cost * cost);

// Additions and multiplications a second that the CPU's kernels make in products that lie in the second-level cache, on all
// threads: what their rates in a picture are held against. Takes half a second. 0 where ggml's operations run.
SD_API sd_status sd_probe_peak(sd_ctx * ctx, double * flops);

// What the denoiser is told of a text, with the words that the context has learned: [width, tokens].
SD_API sd_status sd_probe_text(sd_ctx * ctx, const char * text, sd_receive receive, void * user);

typedef struct sd_weight_info {
    const char * name;           // as single files spell it
    const char * diffusers_name; // as diffusers folders spell it
    const char * type;           // as resident
    const char * file_type;      // as in the file
    int64_t      ne[4];
} sd_weight_info;

// Fills `info` and returns true, or returns false past the end. Strings live as long as the context.
SD_API bool sd_probe_weight(const sd_ctx * ctx, int index, sd_weight_info * info);

// CLIP token ids of a text without begin and end, as floats: [n].
SD_API sd_status sd_probe_clip_tokens(const char * merges_path, const char * text, sd_receive receive, void * user);

// T5's token ids without the end, by the vocabulary in `path`: a spiece.model, a tokenizer.json, or a T5, for which it
// is looked for as families do: [n].
SD_API sd_status sd_probe_t5_tokens(const char * path, const char * data_dir, const char * text, sd_receive receive,
                                    void * user);

// The T5 encoder of a file or folder, on the CPU: ids [n, N], and mask [n, N] or NULL -> [width, n, N].
SD_API sd_status sd_probe_t5(const char * path, const sd_tensor * ids, const sd_tensor * mask, sd_receive receive,
                             void * user);

// What torch.randn(n) gives: [n].
SD_API sd_status sd_probe_noise(const char * rng, uint64_t seed, int64_t n, sd_receive receive, void * user);

// Noise levels of a Stable Diffusion 1.x run: [steps + 1]; of a model whose highest one is noise alone.
SD_API sd_status sd_probe_sigmas(const char * scheduler, int steps, bool zero_snr, sd_receive receive, void * user);

// The denoiser of a sampler under test: x and denoised are [n]; return false to stop.
typedef bool (*sd_probe_denoiser)(const float * x, float sigma, float * denoised, int64_t n, void * user);

// Runs a sampler alone over `images` images one after another in `x`: [n]. Image k draws from seed + k,
// after `skip` normal numbers of the same stream. `flow`: of a rectified flow.
SD_API sd_status sd_probe_sample(const char * sampler, const float * sigmas, int n_sigmas, const char * rng,
                                 uint64_t seed, int64_t skip, float eta, bool flow, float * x, int64_t n, int images,
                                 sd_probe_denoiser denoise, void * user);

// The tensors of a checkpoint as stored, without opening a model: calls `each` once per tensor.
typedef void (*sd_probe_stored)(const char * name, const char * type, const int64_t ne[4], int dims,
                                const void * data, size_t bytes, void * user);
SD_API sd_status sd_probe_checkpoint(const char * path, sd_probe_stored each, void * user);

// ---- LoRA files without a model ------------------------------------------------------------------------
// A file is read against an outline: the names and shapes of the weights that a model of the family has.

typedef struct sd_outline_part {
    const char * diffusers_name;
    int64_t      first_row, rows;
    bool         swap_halves; // diffusers has the two halves of these rows the other way round
} sd_outline_part;

typedef struct sd_outline_weight {
    const char *            name;           // as single files spell it
    const char *            diffusers_name; // "" where it is fused
    int64_t                 ne[4];
    bool                    table; // of embeddings
    const sd_outline_part * parts;
    int                     n_parts;
} sd_outline_weight;

typedef struct sd_lora_file sd_lora_file;

// Opens a LoRA file; `*json` is its report without what a model would tell, and lives as long as the file.
SD_API sd_status sd_probe_lora_file_open(const char * path, const sd_outline_weight * weights, int n_weights,
                                   sd_lora_file ** file, const char ** json);
SD_API void      sd_probe_lora_file_close(sd_lora_file * file);

// The tensors of one module, by the stem of their keys.
typedef struct sd_lora_stem {
    const char * stem;
    const char * format;        // "kohya", "peft", ...
    int          weight, bias;  // what the stem means in the outline; -1: nothing
    int64_t      first_row, rows; // of the weight or, where there is none, of the bias
    int64_t      out, columns;  // sizes that the tensors themselves state; 0: not stated
    int          kh, kw;        // 0: no kernel, or one that lies unfolded in the columns
    bool         absent;        // the outline lacks its whole component
    const char * type;          // of the largest tensor
} sd_lora_stem;
SD_API bool sd_probe_lora_file_stem(const sd_lora_file * file, int index, sd_lora_stem * stem);

typedef struct sd_lora_factor {
    const char *  role;     // as LoraKind lists them; DoRA's is "magnitude"
    int           dims;
    int64_t       shape[4]; // numpy's order
    const float * data;
} sd_lora_factor;

typedef struct sd_lora_module {
    const char * kind; // "lora", "loha", ...
    int          weight;
    int64_t      first_row, rows;
    bool         swap_halves;
    double       scale;
    bool         on_input, magnitude_of_columns;
    double       constraint; // of OFT; below 0: none
    const sd_lora_factor * factors;
    int          n_factors;
} sd_lora_module;
typedef void (*sd_receive_module)(const sd_lora_module * module, void * user);

// Reads the modules of one stem, one call each.
SD_API sd_status sd_probe_lora_file_read(const sd_lora_file * file, int stem, sd_receive_module receive, void * user);

// The change [columns, rows] that one of them makes; `base` (its rows of the pristine weight) may be NULL.
SD_API sd_status sd_probe_lora_file_delta(const sd_lora_file * file, int stem, int module, const float * base,
                                    float multiplier, sd_receive receive, void * user);

#ifdef __cplusplus
}
#endif

#endif // SDCPP_PROBE_H
