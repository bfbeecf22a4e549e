#include "kernels/peak.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <vector>

namespace sd {
namespace {

constexpr int     channels = 1024, rows = 96, repeats = 20, runs = 8; // some 600 KB of f32: a second-level cache
constexpr int64_t pieces_a_thread = 8;

// What one thread works on.
struct Bench {
    std::vector<float> x = std::vector<float>(size_t{rows} * channels, 0.5f);
    std::vector<float> panel, y, scratch;
    Epilogue           epilogue{};
    Block              block{};

    explicit Bench(const KernelSet & set)
        : panel(static_cast<size_t>(set.panel_bytes(Form::direct, 1, channels)) / sizeof(float)),
          y(static_cast<size_t>(rows) * set.panel),
          scratch(static_cast<size_t>(set.row_scratch(Form::direct, 1, channels)) / sizeof(float) + 1) {
        Rows & from = block.operands[0].rows;
        from.x = x.data(); // as bf16 they are numbers too
        from.bf16 = set.bf16;
        from.pixel = channels;
        from.width = from.seen_width = from.out_width = rows;
        from.height = from.seen_height = from.out_height = 1;
        block.operands[0].length = channels;
        block.operands[0].panels = panel.data();
        block.end_row = rows;
        block.y = {y.data(), false};
        block.y_row = block.columns = set.panel;
        block.first = block.last = true;
        block.epilogue = &epilogue;
        block.scratch = scratch.data();
    }
};

} // namespace

double peak_rate(const KernelSet & set, Pool & pool) {
    std::deque<Bench> benches; // which stay where they are
    for (int thread = 0; thread < pool.threads(); ++thread) {
        benches.emplace_back(set);
    }
    const int64_t pieces = pieces_a_thread * pool.threads();
    const double  operations = 2.0 * rows * channels * set.panel * repeats * static_cast<double>(pieces);
    double        best = 0;
    for (int run = 0; run < runs; ++run) {
        const auto begin = std::chrono::steady_clock::now();
        pool.run(pieces, operations, [&](int64_t, int thread) {
            for (int i = 0; i < repeats; ++i) {
                set.product(benches[static_cast<size_t>(thread)].block);
            }
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        best = std::max(best, operations / took.count());
    }
    return best;
}

} // namespace sd
