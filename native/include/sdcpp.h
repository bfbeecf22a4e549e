/*
 * sdcpp.h: everything that the engine offers to other programs.
 *
 *     sd_open_params open = sd_default_open_params();
 *     open.model = "v1-5.safetensors";
 *     open.data_dir = "share/sdcpp";                   // holds clip_merges.txt
 *     sd_ctx * ctx = NULL;
 *     if (sd_open(&open, &ctx) != SD_OK) { puts(sd_last_error()); return 1; }
 *
 *     sd_span span = {"a red heart", 1.0f};
 *     sd_prompt prompt = {&span, 1};
 *     sd_request request = sd_default_request(ctx);
 *     request.prompts = &prompt;
 *     request.n_prompts = 1;
 *     uint8_t * rgb = malloc(3 * request.width * request.height);
 *     if (sd_generate(ctx, &request, rgb) != SD_OK) puts(sd_last_error());
 *     sd_close(ctx);
 *
 * A context holds one model. It is used by one thread at a time and guards itself: a second caller gets
 * SD_BUSY. Several contexts run side by side. Callbacks belong to a context, never to the process.
 * A call that fails says why in sd_last_error(), which is kept per thread.
 * Strings are UTF-8, lengths are in pixels, images are 8-bit RGB rows from the top.
 */
#ifndef SDCPP_H
#define SDCPP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SD_API __declspec(dllexport)
#else
#define SD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sd_status {
    SD_OK = 0,
    SD_BAD_ARGUMENT,  // the caller can mend it
    SD_BAD_FILE,      // damaged, or not what it claims to be
    SD_UNSUPPORTED,   // sound, but nothing that we know
    SD_OUT_OF_MEMORY,
    SD_CANCELLED,     // a callback said so
    SD_BUSY,          // another thread is using the context
    SD_IO,            // the operating system refused
    SD_INTERNAL       // ours: please report it
} sd_status;

// Why the last call of this thread failed; "" where none did.
SD_API const char * sd_last_error(void);

SD_API const char * sd_version(void);

// What the library knows, one name per index; NULL past the end. The first is the default where there is one.
SD_API const char * sd_sampler_name(int index);
SD_API const char * sd_scheduler_name(int index);
SD_API const char * sd_rng_name(int index);
SD_API const char * sd_family_name(int index);

typedef struct sd_device {
    const char * name;        // for sd_open_params.backend
    const char * description;
    size_t       memory_free, memory_total; // bytes
    bool         is_cpu;
} sd_device;

// Fills `device` and returns true, or returns false past the end; at index 0 also where the installed ggml cannot run on
// this processor, as sd_last_error() says.
SD_API bool sd_get_device(int index, sd_device * device);

// Adds devices of ggml's RPC backend ("host:port"), where ggml was built with it. ggml ends the process where
// the server goes away later, or is no RPC server.
SD_API sd_status sd_add_rpc_devices(const char * endpoint);

// How the engine and its ggml were built: "key: value" lines.
SD_API const char * sd_build_info(void);

// ---- a model in memory ---------------------------------------------------------------------------------

typedef struct sd_ctx sd_ctx;

typedef enum sd_log_level { SD_LOG_DEBUG = 0, SD_LOG_INFO, SD_LOG_WARNING, SD_LOG_ERROR } sd_log_level;
typedef void (*sd_log_callback)(sd_log_level level, const char * message, void * user);

// A part of the model in a file of its own.
typedef struct sd_component {
    const char * role; // "model" (the denoiser), "vae", "clip_l"
    const char * path;
} sd_component;

// How LoRAs act.
//   "runtime"  weights are never written; all active LoRAs take part in the products (the default)
//   "restore"  touched weights are rebuilt from the base: no cost per step
//   "diff"     touched weights get the differences added: rounding accumulates until sd_reset_loras()
typedef struct sd_open_params {
    const char *         model;        // a .safetensors or .gguf file, or a diffusers folder
    const sd_component * components;   // replace what is inside `model`
    int                  n_components;
    const char *         data_dir;     // folder with the vocabularies
    const char *         backend;      // a device's name; NULL: the best
    int                  threads;      // 0: one per core
    const char *         precision;    // of products on the CPU: "f32", "bf16"; NULL or "auto": as the processor likes
    const char *         prediction;   // "eps" or "v"; NULL: as the file says, else the family's own
    int                  zero_snr;     // of the highest noise level, which is noise alone then: 1 yes, -1 no, 0: as the file says
    const char *         lora_mode;    // NULL: "runtime"
    const char *         base_copy;    // "file" (NULL): the model is mapped; "ram": read whole, and may then change or vanish
    bool                 requantise;   // a touched quantised weight goes back to its type; else it is held in f16
    bool                 strict_loras; // any key of a LoRA that fits nothing is an error
    size_t               lora_cache;   // bytes of read LoRAs that are kept though no prompt names them; 0: 2 GB
    size_t               memory_limit; // bytes of weights and activations on the device at a time; 0: what it has
    sd_log_callback      log;          // may be NULL
    void *               log_user;
} sd_open_params;

SD_API sd_open_params sd_default_open_params(void);

// On success `*ctx` is to be closed by sd_close; on failure it is NULL.
SD_API sd_status sd_open(const sd_open_params * params, sd_ctx ** ctx);
SD_API void      sd_close(sd_ctx * ctx); // NULL is allowed

typedef struct sd_model_info {
    const char * family;         // "sd1"
    const char * prediction;     // "eps", "v" or "flow"
    const char * backend;        // the device's name
    int          threads;
    const char * kernels;        // of the CPU: "avx512", "avx2", "plain", or "reference" for ggml's own operations
    const char * precision;      // of products: "f32" or "bf16"
    int          size_multiple;  // width and height are multiples of it
    int          native_size;    // pixels, what the network was trained at
    int          latent_channels;
    int          input_channels; // of the denoiser: latent_channels and what it sees beside the latent
    size_t       weight_bytes;   // as resident
    int          n_weights;
    int          latent_cell;    // side of a latent's cell in pixels: 8 for Stable Diffusion
    bool         zero_snr;       // whether the highest noise level is noise alone
    int          redux_size;     // side of the picture that FLUX.1 Redux looks at, in pixels; 0: it is not there
} sd_model_info;

// Strings live as long as the context. Of no context: all zeros.
SD_API sd_model_info sd_get_model_info(const sd_ctx * ctx);

// A hash of all resident weights: 64 hexadecimal digits and a final 0.
SD_API sd_status sd_fingerprint(sd_ctx * ctx, char hex[65]);

// ---- weights in files ----------------------------------------------------------------------------------

// A type of elements in files.
typedef struct sd_type {
    const char * name;             // "q8_0"
    int          number;           // in GGUF files; types that only safetensors has are from 1000 up
    int64_t      block;            // elements of a row that are stored together; 1 where not quantised
    size_t       block_bytes;
    bool         can_read, can_write; // by sd_convert_rows()
    bool         wants_importance; // quantises poorly without
} sd_type;

// Fills `type` and returns true, or returns false past the end.
SD_API bool sd_get_type(int index, sd_type * type);

// Rows of elements of one type as another, by way of f32; quantised by ggml's own routines. `importance` has a weight
// per column, or is NULL. Rows do not depend on each other: several threads may convert different ones.
SD_API sd_status sd_convert_rows(const char * from_type, const void * from, const char * to_type, void * to,
                                 int64_t rows, int64_t row_length, const float * importance);

// A tensor as it lies in its file. Strings live during the call only.
typedef struct sd_stored {
    const char * name;   // as a single file spells it, or "unet.…", "vae.…" of a diffusers folder
    const char * type;
    int          dims;   // as the file states it; beyond 4 they are folded into ne[3]
    int64_t      ne[4];  // the fastest dimension first; 1 beyond `dims`
    const char * path;
    size_t       offset, bytes;
    float        scale;  // what the elements are multiplied by, of 8-bit floats; else 1
} sd_stored;

// Return false to stop.
typedef bool (*sd_on_stored)(const sd_stored * tensor, void * user);
typedef bool (*sd_on_metadata)(const char * key, const char * value, void * user);

// The tensors of a model's files and its metadata, without opening it; nothing is read but headers.
SD_API sd_status sd_list_tensors(const char * model, const sd_component * components, int n_components,
                                 sd_on_stored on_tensor, sd_on_metadata on_metadata, void * user);

// A weight that a family declares, or a part of a fused one. Strings live during the call only.
typedef struct sd_declared {
    const char * name;            // as single files spell it
    const char * diffusers_name;  // as diffusers folders spell it; "" where they have none
    int64_t      ne[4];           // of the whole weight
    int64_t      first_row, rows; // of the part
    bool         swap_halves;     // diffusers has the two halves of these rows the other way round
    bool         table;           // of embeddings: its rows are looked up, not multiplied
} sd_declared;

typedef bool (*sd_on_declared)(const sd_declared * weight, void * user);

// The weights that a model's family declares, without loading it. `family` is set to its name.
SD_API sd_status sd_list_weights(const sd_open_params * params, const char ** family, sd_on_declared on_weight,
                                 void * user);

// ---- painting ------------------------------------------------------------------------------------------

// A run of text and how strongly to follow it; 1 is plain. A NULL text is a BREAK: the next span begins a
// new chunk of 75 tokens.
typedef struct sd_span {
    const char * text;
    float        weight;
} sd_span;

// The multiplier of modules below a path ("model.diffusion_model.input_blocks.4"), on top of the LoRA's own.
typedef struct sd_lora_block {
    const char * prefix;
    double       factor;
} sd_lora_block;

typedef struct sd_lora {
    const char *          path;        // a .safetensors or .gguf file, or a folder that PEFT saved
    double                text[3];     // multipliers of the text encoders: CLIP-L or the only one, CLIP-G, T5
    double                unet;        // and of the denoiser
    double                start, stop; // of the steps, as fractions: 0 and 1 for all
    const sd_lora_block * blocks;
    int                   n_blocks;
} sd_lora;

typedef struct sd_prompt {
    const sd_span * spans;
    int             n_spans;
    const sd_lora * loras; // the same file twice: the sum; a negative prompt has none
    int             n_loras;
} sd_prompt;

// Called after each denoising step, `step` from 1 to `steps`; return false to stop. sd_preview() may be
// called from inside it.
typedef bool (*sd_on_step)(int step, int steps, void * user);

// Called now and then (about every tenth of a second) while networks run, on a device other than the CPU before
// each network; return false to stop.
typedef bool (*sd_keep_going)(void * user);

// What SDXL is told of a picture: that it is a cut, from this corner, of one that had the original size before it was
// scaled, and has the target size now. Pixels. What is left out is the picture's own, not cropped; of the negative
// prompt's sizes it is as the others.
typedef struct sd_sizes {
    int original_width, original_height; // 0: left out
    int crop_top, crop_left;             // below 0: left out
    int target_width, target_height;     // 0: left out
} sd_sizes;

typedef struct sd_request {
    const sd_prompt * prompts;          // one, or one per image
    int               n_prompts;
    const sd_prompt * negative_prompts; // none, one, or one per image
    int               n_negative_prompts;
    int               width, height;
    sd_sizes          sizes, negative_sizes; // of SDXL alone
    int               steps;
    float             cfg_scale;        // 1 turns guidance off
    float             guidance_rescale; // share of the guided output that is brought to the prompt's own spread, 0 to 1
    float             guidance;         // what models distilled for guidance are told, as FLUX.1 dev; < 0: their own
    float             shift;            // of the noise levels of rectified flows, as SD3 and FLUX; 0: their own
    uint64_t          seed;             // image k of a batch is the image of seed + k alone
    int               batch_size;
    const char *      sampler;          // NULL: the family's own
    const char *      scheduler;        // NULL: the family's own
    const char *      rng;              // NULL: "cpu"
    float             eta;              // share of fresh noise of the samplers that add some; < 0: their own
    int               clip_skip;        // 1: the last layer of the text tower; 2: the one before; 0: the family's own
    const uint8_t *   init_image;       // width * height RGB to start from, or NULL
    float             strength;         // of the change to init_image, 0 to 1
    const uint8_t *   mask;             // width * height grey, 255 where to repaint; needs init_image; or NULL
    const uint8_t *   control_image;    // width * height RGB, edges or depths, for models that need one; or NULL
    const uint8_t *   reference_image;  // reference_width * reference_height RGB, for FLUX.1 Kontext to look at; or NULL
    int               reference_width, reference_height;
    const uint8_t *   redux_image;      // redux_size * redux_size RGB, for FLUX.1 Redux to vary; or NULL
    float             redux_strength;   // of its tokens, usually 0 to 1
    int               vae_tile;         // decode and encode in tiles of this many pixels; 0: only where needed
    sd_on_step        on_step;          // may be NULL
    sd_keep_going     keep_going;       // may be NULL
    void *            user;
} sd_request;

// A request with the family's defaults, to be filled in. Of no context: all zeros.
SD_API sd_request sd_default_request(const sd_ctx * ctx);

// Paints batch_size images one after another into `rgb`, which holds batch_size * height * width * 3 bytes.
SD_API sd_status sd_generate(sd_ctx * ctx, const sd_request * request, uint8_t * rgb);

// What a network takes of the device's memory, in bytes. `network` lives during the call only.
typedef struct sd_network_memory {
    const char * network; // "text1", "t5", "denoise", "vae_decode", ...
    size_t       weights, activations;
} sd_network_memory;

// Return false to stop.
typedef bool (*sd_on_network)(const sd_network_memory * memory, void * user);

// What sd_generate() would take with the LoRAs that act now, before it reads any weight: `*peak` is the most at a time, and
// `on_network`, which may be NULL, is told of each network. What the process itself takes comes on top.
SD_API sd_status sd_estimate_memory(sd_ctx * ctx, const sd_request * request, size_t * peak, sd_on_network on_network,
                                    void * user);

// ---- LoRA ----------------------------------------------------------------------------------------------

// Makes exactly these LoRAs act: adds what is new, changes multipliers, and takes away what is not named. Where it
// fails, weights and state are as they were. sd_generate() does this with what its prompts name.
SD_API sd_status sd_apply_loras(sd_ctx * ctx, const sd_lora * loras, int n_loras);

// No LoRA acts, and every weight is the base's, bit for bit.
SD_API sd_status sd_reset_loras(sd_ctx * ctx);

// What acts on image `image` of the last batch: fills `lora` and returns true, or returns false past the end.
// Strings live until the LoRAs change.
SD_API bool sd_get_lora(const sd_ctx * ctx, int image, int index, sd_lora * lora);

// What became of the keys of a file, as a JSON object: of each file that acts, or NULL past the end. Index 0 asks anew; the
// strings live until then.
SD_API const char * sd_lora_report(sd_ctx * ctx, int index);

// The same of any file, without using it. The string lives until the next call.
SD_API sd_status sd_inspect_lora(sd_ctx * ctx, const char * path, const char ** json);

// "diff" mode: the relative RMS of the touched weights against what "restore" would hold.
SD_API sd_status sd_lora_drift(sd_ctx * ctx, double * drift);

// Inside on_step only: a cheap picture of the current estimate of image `image`, a pixel per latent cell
// (width / latent_cell by height / latent_cell), into `rgb`.
SD_API sd_status sd_preview(sd_ctx * ctx, int image, uint8_t * rgb);

// Of what a matrix was multiplied with: the sum of squares of each column, over so many rows. What sd_convert_rows()
// takes as importance is their quotient.
typedef struct sd_importance {
    const char *   name; // of the matrix, as single files spell it
    int64_t        columns, rows;
    const double * sums; // [columns]
} sd_importance;

// Starts collecting it from all that is painted, or stops and forgets. Pictures take longer meanwhile.
SD_API sd_status sd_collect_importance(sd_ctx * ctx, bool on);

// Fills `importance` and returns true, or returns false past the end. What it points to lives until the next call
// with this context.
SD_API bool sd_get_importance(const sd_ctx * ctx, int index, sd_importance * importance);

// A word that stands for vectors of its own: a textual inversion.
typedef struct sd_learned_word {
    const char *  name;       // prompts name it by this, in letters of any case
    int           vectors;    // 1 to 75
    const float * data[2];    // [vectors, width] for each text encoder of the model (SDXL: CLIP-L, OpenCLIP), then NULL
    int           width[2];
} sd_learned_word;

// Makes exactly these words stand for vectors in the prompts that follow. Nothing changes where one does not fit.
SD_API sd_status sd_learn_words(sd_ctx * ctx, const sd_learned_word * words, int n_words);

// Counts the tokens of a text as the model's tokenizer splits it (without begin and end); a learned word
// counts as many as it has vectors.
SD_API sd_status sd_count_tokens(sd_ctx * ctx, const char * text, int * count);

#ifdef __cplusplus
}
#endif

#endif // SDCPP_H
