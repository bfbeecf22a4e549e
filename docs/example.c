/*
 * Paints a picture with libsdcpp and writes it as a PPM file, which most viewers open. C11, nothing else needed.
 *
 *     cc -std=c11 example.c $(pkg-config --cflags --libs sdcpp) -o example
 *     ./example model.gguf "$(pkg-config --variable=datadir sdcpp)" "a red heart" heart.ppm
 *
 * With CMake: find_package(sdcpp REQUIRED), then target_link_libraries(example sdcpp::sdcpp); the folder with
 * the vocabularies is in sdcpp_DATA_DIR.
 */
#include <sdcpp.h>

#include <stdio.h>
#include <stdlib.h>

static void print_log(sd_log_level level, const char * message, void * user) {
    (void) user;
    if (level >= SD_LOG_INFO) {
        fprintf(stderr, "%s\n", message);
    }
}

// Called after each step; returning false would stop the run with SD_CANCELLED.
static bool print_step(int step, int steps, void * user) {
    (void) user;
    fprintf(stderr, "\rstep %d of %d%s", step, steps, step == steps ? "\n" : "");
    return true;
}

static bool write_ppm(const char * path, const uint8_t * rgb, int width, int height) {
    FILE * file = fopen(path, "wb");
    if (!file) {
        perror(path);
        return false;
    }
    const size_t bytes = 3 * (size_t) width * (size_t) height;
    const bool   written = fprintf(file, "P6\n%d %d\n255\n", width, height) > 0 && fwrite(rgb, 1, bytes, file) == bytes;
    if (fclose(file) != 0 || !written) {
        perror(path);
        return false;
    }
    return true;
}

static bool paint(sd_ctx * ctx, const char * text, int steps, const char * path) {
    const sd_span   span = {text, 1.0f};
    const sd_prompt prompt = {.spans = &span, .n_spans = 1};

    sd_request request = sd_default_request(ctx); // size, steps, sampler, ...: the model's own
    request.prompts = &prompt;
    request.n_prompts = 1;
    request.seed = 7;
    request.steps = steps > 0 ? steps : request.steps;
    request.on_step = print_step;

    uint8_t * rgb = malloc(3 * (size_t) request.width * (size_t) request.height);
    if (!rgb) {
        fprintf(stderr, "no memory for a picture of %d x %d\n", request.width, request.height);
        return false;
    }
    bool painted = sd_generate(ctx, &request, rgb) == SD_OK;
    if (!painted) {
        fprintf(stderr, "%s\n", sd_last_error()); // one sentence: what, which numbers, what to do
    } else {
        painted = write_ppm(path, rgb, request.width, request.height);
    }
    free(rgb);
    return painted;
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL DATA_DIR PROMPT PICTURE.ppm [STEPS]\n", argv[0]);
        return EXIT_FAILURE;
    }
    sd_open_params open = sd_default_open_params();
    open.model = argv[1];
    open.data_dir = argv[2]; // holds clip_merges.txt
    open.log = print_log;

    sd_ctx * ctx = NULL;
    if (sd_open(&open, &ctx) != SD_OK) {
        fprintf(stderr, "%s\n", sd_last_error());
        return EXIT_FAILURE;
    }
    const bool painted = paint(ctx, argv[3], argc > 5 ? atoi(argv[5]) : 0, argv[4]);
    sd_close(ctx);
    return painted ? EXIT_SUCCESS : EXIT_FAILURE;
}
