// Every kernel set that runs here against sums in double, at shapes that fill no tile, in buffers without a byte to spare:
// the build with AddressSanitizer sees what is read or written beside them.
#include <doctest/doctest.h>

#include "core/error.h"
#include "kernels/set.h"
#include "kernels/sets.h"

#include <ggml.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace sd {
#ifdef SDCPP_X86_KERNELS
extern const KernelSet set_amx_emulated;
#endif
} // namespace sd

using namespace sd;

namespace {

std::string name_of(const KernelSet & set) { return std::string(set.name) + (set.bf16 ? " (bf16)" : ""); }

// All that run here, and AMX's with emulated tiles where the rest of it does.
std::vector<const KernelSet *> sets() {
    std::vector<const KernelSet *> out;
    for (const char * name : {"plain", "avx2", "avx512", "amx"}) {
        for (const bool bf16 : {false, true}) {
            try {
                out.push_back(kernel_set(name, bf16));
            } catch (const Error &) { // not of this processor, or without this precision
            }
        }
    }
#ifdef SDCPP_X86_KERNELS
    if (has_native_bf16()) {
        out.push_back(&set_amx_emulated);
    }
#endif
    std::string names;
    for (const KernelSet * set : out) {
        names += " " + name_of(*set);
    }
    MESSAGE("kernels:" << names);
    return out;
}

std::mt19937 engine(7);

std::vector<float> numbers(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float>              out(static_cast<size_t>(n));
    for (float & x : out) {
        x = normal(engine);
    }
    return out;
}

uint16_t to_bf16(float x) {
    uint32_t raw;
    std::memcpy(&raw, &x, sizeof raw);
    return static_cast<uint16_t>((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}

float from_bf16(uint16_t half) {
    const uint32_t raw = uint32_t{half} << 16;
    float          x;
    std::memcpy(&x, &raw, sizeof x);
    return x;
}

// What a set makes of a factor.
double seen(const KernelSet & set, float x) { return set.bf16 ? from_bf16(to_bf16(x)) : x; }

double relative(const std::vector<float> & got, const std::vector<double> & want) {
    double error = 0, size = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    return std::sqrt(error / size);
}

struct Free {
    void operator()(void * p) const { std::free(p); }
};
std::unique_ptr<void, Free> memory(int64_t bytes) {
    return std::unique_ptr<void, Free>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
}

struct Picture {
    int channels, width, height, images;
};

// A product of one picture of f32, or bf16, with a weight [channels * taps, columns], all channels at a time; with an adapter
// added to it: rows of `rank` channels times a weight [rank, columns].
struct Case {
    Picture x;
    int     taps, stride, columns, enlarge;
    bool    bf16;
    Form    form = Form::direct;
    int     rank = 0;
};

struct Shape {
    int pad, taps, rows_w, rows_h, rows;
};

Shape shape_of(const Case & c) {
    const int pad = c.taps / 2, rows_w = (c.x.width * c.enlarge + 2 * pad - c.taps) / c.stride + 1;
    const int rows_h = (c.x.height * c.enlarge + 2 * pad - c.taps) / c.stride + 1;
    return {pad, c.taps * c.taps, rows_w, rows_h, rows_w * rows_h * c.x.images};
}

struct Inputs {
    std::vector<float>    x, w, bias, residual;
    std::vector<float>    adapter_x, adapter_w;
    std::vector<uint16_t> halves; // x as bf16
};

Inputs inputs_of(const Case & c) {
    const Shape shape = shape_of(c);
    Inputs      out{numbers(int64_t{c.x.channels} * c.x.width * c.x.height * c.x.images),
               numbers(int64_t{c.x.channels} * shape.taps * c.columns), numbers(c.columns),
               numbers(int64_t{shape.rows} * c.columns), numbers(int64_t{shape.rows} * c.rank),
               numbers(int64_t{c.rank} * c.columns), {}};
    for (const float v : out.x) {
        out.halves.push_back(to_bf16(v));
    }
    return out;
}

using Memory = std::unique_ptr<void, Free>;

// The panels of a weight [channels * taps, columns].
Memory packed(const KernelSet & set, Form form, const std::vector<float> & w, int channels, int taps, int columns) {
    const int64_t bytes = set.panel_bytes(form, taps, channels), panels = (columns + set.panel - 1) / set.panel;
    const int     padded = (channels + set.channel_step - 1) / set.channel_step * set.channel_step;
    const auto    scratch = memory(int64_t{4} * taps * padded * set.lanes);
    Memory        out = memory(panels * bytes);
    for (int64_t at = 0; at < panels * set.panel; at += set.lanes) {
        const int64_t there = std::min<int64_t>(std::max<int64_t>(columns - at, 0), set.lanes);
        set.pack({form, w.data() + (there ? at * channels * taps : 0), Element::f32, int64_t{channels} * taps,
                  static_cast<int>(there), taps, channels, static_cast<char *>(out.get()) + at / set.panel * bytes,
                  static_cast<int>(at % set.panel), static_cast<float *>(scratch.get())});
    }
    return out;
}

std::vector<float> product_of(const KernelSet & set, const Case & c, const Inputs & inputs) {
    const auto [pad, taps, rows_w, rows_h, rows] = shape_of(c);
    const Memory panels = packed(set, c.form, inputs.w, c.x.channels, taps, c.columns);
    const Memory adapter_panels = packed(set, Form::direct, inputs.adapter_w, c.rank, 1, c.columns);

    const std::vector<float> zeros(static_cast<size_t>(c.x.channels + set.channel_step));
    Epilogue                 epilogue{};
    epilogue.bias = inputs.bias.data();
    epilogue.residual = inputs.residual.data();
    epilogue.residual_row = c.columns;
    epilogue.rows_per_image = rows;
    std::vector<float> y(static_cast<size_t>(rows) * c.columns);
    const auto scratch = memory(set.row_scratch(c.form, taps, c.x.channels) + set.row_scratch(Form::direct, 1, c.rank));
    Block      block{};
    Rows &     from = block.operands[0].rows;
    from.x = c.bf16 ? static_cast<const void *>(inputs.halves.data()) : inputs.x.data();
    from.bf16 = c.bf16;
    from.pixel = c.x.channels;
    from.image = int64_t{c.x.channels} * c.x.width * c.x.height;
    from.width = c.x.width;
    from.height = c.x.height;
    from.seen_width = c.x.width * c.enlarge;
    from.seen_height = c.x.height * c.enlarge;
    from.out_width = rows_w;
    from.out_height = rows_h;
    from.taps_w = from.taps_h = c.taps;
    from.stride = c.stride;
    from.pad = pad;
    from.zeros = zeros.data();
    block.operands[0].form = c.form;
    block.operands[0].length = c.x.channels;
    block.operands[0].panels = panels.get();
    if (c.rank > 0) {
        Rows & adapter = block.operands[1].rows;
        adapter.x = inputs.adapter_x.data();
        adapter.pixel = c.rank;
        adapter.width = adapter.seen_width = adapter.out_width = rows;
        adapter.height = adapter.seen_height = adapter.out_height = 1;
        block.operands[1].form = Form::direct;
        block.operands[1].length = c.rank;
        block.operands[1].panels = adapter_panels.get();
        block.count = 2;
    }
    block.end_row = rows;
    block.y = {y.data(), false};
    block.y_row = c.columns;
    block.columns = c.columns;
    block.first = block.last = true;
    block.epilogue = &epilogue;
    block.scratch = scratch.get();
    set.product(block);
    return y;
}

// Both x and the weight are given as products see them, so what remains is the order of sums.
void check_product(const KernelSet & set, const Case & c) {
    const auto inputs = inputs_of(c);
    const auto y = product_of(set, c, inputs);
    const auto & [x, w, bias, residual, adapter_x, adapter_w, halves] = inputs;
    const auto [pad, taps, rows_w, rows_h, rows] = shape_of(c);
    std::vector<double> want;
    for (int row = 0; row < rows; ++row) {
        const int image = row / (rows_w * rows_h), at_y = row / rows_w % rows_h, at_x = row % rows_w;
        for (int column = 0; column < c.columns; ++column) {
            double sum = bias[column] + residual[static_cast<size_t>(row) * c.columns + column];
            for (int tap = 0; tap < taps; ++tap) {
                const int down = at_y * c.stride - pad + tap / c.taps, across = at_x * c.stride - pad + tap % c.taps;
                if (down < 0 || across < 0 || down >= c.x.height * c.enlarge || across >= c.x.width * c.enlarge) {
                    continue;
                }
                const int64_t pixel = (int64_t{image} * c.x.height + down / c.enlarge) * c.x.width + across / c.enlarge;
                for (int channel = 0; channel < c.x.channels; ++channel) {
                    const float value = x[pixel * c.x.channels + channel];
                    sum += (c.bf16 ? from_bf16(to_bf16(value)) : seen(set, value)) *
                           seen(set, w[(int64_t{column} * c.x.channels + channel) * taps + tap]);
                }
            }
            for (int i = 0; i < c.rank; ++i) {
                sum += seen(set, adapter_x[static_cast<size_t>(row) * c.rank + i]) *
                       seen(set, adapter_w[static_cast<size_t>(column) * c.rank + i]);
            }
            want.push_back(sum);
        }
    }
    // bf16 rounds to 2^-9 of the next power of two, which is 1.6e-3 of a number on the average. By minimal filtering that becomes
    // of what inputs and taps are transformed to (each result sums 9 of 16 products, whose size is 25 / 9 of a direct sum's:
    // 1.6e-3 sqrt(2) 5 / 3 = 3.8e-3), and what is compared with rounds inputs and taps themselves (2.3e-3): 4.5e-3 in all, and
    // more where most taps lie outside of a small picture, since of those only what is rounded away remains.
    CHECK(relative(y, want) < (c.form != Form::direct && set.bf16 ? 8e-3 : 2e-6));
}

void check_attention(const KernelSet & set, int size, int queries, int keys, bool masked) {
    const auto q = numbers(int64_t{size} * queries), k = numbers(int64_t{size} * keys), v = numbers(int64_t{size} * keys);
    auto       mask = numbers(int64_t{keys} * queries);
    for (size_t i = 0; i < mask.size(); i += 3) {
        mask[i] = -INFINITY;
    }
    std::vector<float> out(q.size());
    const auto         scratch = memory(set.head_scratch(keys, size));
    const float        scale = 1 / std::sqrt(static_cast<float>(size));
    Head               head{};
    head.q = q.data();
    head.k = k.data();
    head.v = v.data();
    head.out = {out.data(), false};
    head.q_row = head.k_row = head.v_row = head.out_row = size;
    head.mask = masked ? mask.data() : nullptr;
    head.mask_row = keys;
    head.end_query = queries;
    head.keys = keys;
    head.size = size;
    head.scale = scale;
    head.scratch = scratch.get();
    set.attention(head);

    std::vector<double> want;
    for (int query = 0; query < queries; ++query) {
        std::vector<double> chances, sums(static_cast<size_t>(size));
        double              total = 0;
        for (int key = 0; key < keys; ++key) {
            double score = 0;
            for (int i = 0; i < size; ++i) {
                score += double{q[query * size + i]} * k[key * size + i];
            }
            chances.push_back(std::exp(score * scale + (masked ? mask[query * keys + key] : 0)));
            total += chances.back();
            for (int i = 0; i < size; ++i) {
                sums[i] += chances.back() * v[key * size + i];
            }
        }
        for (const double sum : sums) {
            want.push_back(sum / total);
        }
    }
    // bf16 rounds queries, keys, chances and values: 2^-9 at most each, of which the first two come through an exponential.
    CHECK(relative(out, want) < (set.bf16 ? 8e-3 : 1e-6));
}

// With x in f32 for every set, and in bf16 for those whose products are.
template <typename Check> void with_every_set(const Check & check) {
    for (const KernelSet * set : sets()) {
        INFO(name_of(*set));
        check(*set, false);
        if (set->bf16) {
            check(*set, true);
        }
    }
}

} // namespace

TEST_CASE("products of tokens and pictures") {
    with_every_set([](const KernelSet & set, bool bf16) {
        for (const int rows : {1, 2, 5, 6, 16, 17, 31, 32, 33, 75}) {
            check_product(set, {{64, rows, 1, 1}, 1, 1, 70, 1, bf16});
        }
        for (const int channels : {2, 4, 30, 32, 40, 97, 320}) {
            check_product(set, {{channels + channels % 2 * bf16, 9, 1, 2}, 1, 1, 33, 1, bf16});
            check_product(set, {{channels + channels % 2 * bf16, 7, 5, 2}, 3, 1, 65, 1, bf16});
        }
        for (const int columns : {1, 4, 8, 15, 16, 17, 32, 40, 48, 64, 129}) {
            check_product(set, {{24, 6, 7, 1}, 3, 1, columns, 1, bf16});
        }
        check_product(set, {{16, 9, 8, 1}, 3, 2, 20, 1, bf16});
        check_product(set, {{16, 5, 4, 2}, 3, 1, 20, 2, bf16});
        check_product(set, {{8, 4, 3, 1}, 1, 1, 20, 2, bf16});
    });
}

// Numbers that all types hold exactly, in rows longer than what is taken of them.
TEST_CASE("weights of every type unpack to the same") {
    constexpr int row = 9 * 70, lines = 16;
    std::vector<float>    w(static_cast<size_t>(row) * lines);
    std::vector<uint16_t> f16, bf16;
    for (float & x : w) {
        x = static_cast<float>(static_cast<int>(engine() % 255) - 127) / 8;
        f16.push_back(ggml_fp32_to_fp16(x));
        bf16.push_back(to_bf16(x));
    }
    for (const KernelSet * set : sets()) {
        INFO(name_of(*set));
        for (const Form form : {Form::direct, Form::winograd, Form::winograd_doubled}) {
            for (const int taps : {1, 4, 9}) {
                for (const int length : {1, 2, 31, 32, 33, 64, 70}) {
                    if (form != Form::direct && (taps != 9 || !set->winograd)) {
                        continue;
                    }
                    const auto bytes = static_cast<size_t>(set->panel_bytes(form, taps, length));
                    const int  padded = (length + set->channel_step - 1) / set->channel_step * set->channel_step;
                    const auto scratch = memory(int64_t{4} * taps * padded * set->lanes);
                    const auto unpacked = [&](const void * from, Element element, int rows) {
                        std::vector<char> panel(bytes);
                        const auto        to = memory(static_cast<int64_t>(bytes));
                        std::memset(to.get(), 0, bytes);
                        set->pack({form, from, element, row, rows, taps, length, to.get(), 0, static_cast<float *>(scratch.get())});
                        std::memcpy(panel.data(), to.get(), bytes);
                        return panel;
                    };
                    for (const int rows : {1, set->lanes}) {
                        const std::vector<char> want = unpacked(w.data(), Element::f32, rows);
                        CHECK(unpacked(f16.data(), Element::f16, rows) == want);
                        CHECK(unpacked(bf16.data(), Element::bf16, rows) == want);
                    }
                }
            }
        }
    }
}

// Of lines as long as AMX's tiles are high, and longer: rows of a tile then share what their taps see.
TEST_CASE("convolutions of wide pictures") {
    with_every_set([](const KernelSet & set, bool bf16) {
        for (const int channels : {2, 30, 32, 64, 97}) {
            check_product(set, {{channels + channels % 2 * bf16, 16, 3, 2}, 3, 1, 33, 1, bf16});
        }
        for (const int width : {15, 17, 32, 48, 80}) {
            check_product(set, {{40, width, 3, 1}, 3, 1, 20, 1, bf16});
        }
        check_product(set, {{32, 32, 5, 2}, 3, 2, 20, 1, bf16});
        check_product(set, {{32, 8, 3, 2}, 3, 1, 20, 2, bf16});
        check_product(set, {{32, 16, 6, 1}, 5, 1, 20, 1, bf16});
        check_product(set, {{32, 16, 6, 1}, 5, 4, 20, 4, bf16});
    });
}

TEST_CASE("products with an adapter") {
    with_every_set([](const KernelSet & set, bool bf16) {
        for (const int rank : {1, 4, 16, 33}) {
            check_product(set, {{64, 75, 1, 1}, 1, 1, 70, 1, bf16, Form::direct, rank});
            check_product(set, {{40, 16, 4, 1}, 3, 1, 70, 1, bf16, Form::direct, rank});
            check_product(set, {{40, 7, 5, 2}, 3, 1, 33, 1, bf16, Form::direct, rank});
        }
    });
}

TEST_CASE("convolutions by minimal filtering") {
    with_every_set([](const KernelSet & set, bool bf16) {
        if (!set.winograd) {
            return;
        }
        for (const int channels : {2, 15, 16, 40, 97}) {
            check_product(set, {{channels + channels % 2 * bf16, 7, 5, 2}, 3, 1, 65, 1, bf16, Form::winograd});
            check_product(set, {{channels + channels % 2 * bf16, 4, 3, 2}, 3, 1, 65, 2, bf16, Form::winograd_doubled});
        }
        for (const int columns : {1, 8, 17, 33, 48, 64, 129}) {
            check_product(set, {{24, 8, 6, 1}, 3, 1, columns, 1, bf16, Form::winograd});
            check_product(set, {{24, 5, 7, 1}, 3, 1, columns, 2, bf16, Form::winograd_doubled});
        }
        for (const int size : {1, 2, 3, 10}) {
            check_product(set, {{16, size, 3, 3}, 3, 1, 20, 1, bf16, Form::winograd});
            check_product(set, {{16, 3, size, 3}, 3, 1, 20, 1, bf16, Form::winograd});
            check_product(set, {{16, size, 3, 3}, 3, 1, 20, 2, bf16, Form::winograd_doubled});
        }
        check_product(set, {{16, 5, 4, 2}, 3, 1, 20, 3, bf16, Form::winograd}); // enlarged to thrice its size
    });
}

TEST_CASE("attention") {
    for (const KernelSet * set : sets()) {
        INFO(name_of(*set));
        for (const int size : {3, 8, 40, 64, 80, 160}) {
            check_attention(*set, size, 20, 77, false);
        }
        for (const int keys : {1, 2, 16, 63, 64, 65, 255, 257, 600}) {
            check_attention(*set, 16, 17, keys, false);
            check_attention(*set, 16, 17, keys, keys > 2);
        }
        for (const int queries : {1, 6, 96, 97, 113}) {
            check_attention(*set, 24, queries, 70, true);
        }
    }
}

// What a kernel keeps in registers, AMX's tiles among them, outlives every change of threads in its midst.
TEST_CASE("products of more threads than processors") {
    const Case c{{320, 16, 16, 1}, 3, 1, 64, 1, false};
    const auto inputs = inputs_of(c);
    for (const KernelSet * set : sets()) {
        INFO(name_of(*set));
        const auto               want = product_of(*set, c, inputs);
        std::atomic<int>         wrong{0};
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < std::thread::hardware_concurrency() + 3; ++i) {
            threads.emplace_back([&] {
                for (int repeat = 0; repeat < 2; ++repeat) {
                    wrong += product_of(*set, c, inputs) != want;
                }
            });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        CHECK(wrong == 0);
    }
}
