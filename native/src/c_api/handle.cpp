#include "c_api/handle.h"

#include <algorithm>

namespace sd {

std::vector<ComponentFile> to_components(const sd_component * from, int n) {
    std::vector<ComponentFile> components;
    for (int i = 0; i < n; ++i) {
        need(from, "components");
        components.push_back({or_empty(from[i].role), or_empty(from[i].path)});
    }
    return components;
}

std::vector<LoraUse> to_loras(const sd_lora * from, int n) {
    std::vector<LoraUse> uses;
    for (int i = 0; i < n; ++i) {
        need(from, "the list of LoRAs");
        need(from[i].path, "the path of a LoRA");
        const double * of_text = from[i].text;
        LoraUse        use{from[i].path, {of_text[0], of_text[1], of_text[2]}, from[i].unet, from[i].start, from[i].stop, {}};
        for (int k = 0; k < from[i].n_blocks; ++k) {
            need(from[i].blocks, "the block weights of a LoRA");
            use.blocks.push_back({or_empty(from[i].blocks[k].prefix), from[i].blocks[k].factor});
        }
        uses.push_back(std::move(use));
    }
    return uses;
}

Tensor to_tensor(const sd_tensor & from) {
    constexpr int64_t limit = int64_t(1) << 32; // numbers; a test's tensor is far below
    int64_t           n = 1;
    for (const int64_t length : from.ne) {
        if (length < 1 || length > limit || (n *= length) > limit) {
            fail(Status::bad_argument, "input '%s': a dimension of %lld", or_empty(from.name).c_str(),
                     static_cast<long long>(length));
        }
    }
    need(from.data, "an input's data");
    Tensor tensor({from.ne[0], from.ne[1], from.ne[2], from.ne[3]});
    std::copy(from.data, from.data + n, tensor.data.begin());
    return tensor;
}

void give(Tensor tensor, sd_receive receive, void * user) {
    need(reinterpret_cast<const void *>(receive), "the receiver");
    const sd_tensor out{"", {tensor.ne[0], tensor.ne[1], tensor.ne[2], tensor.ne[3]}, tensor.data.data()};
    receive(&out, user);
}

void give(std::vector<float> values, sd_receive receive, void * user) {
    Tensor tensor;
    tensor.ne = {static_cast<int64_t>(values.size()), 1, 1, 1};
    tensor.data = std::move(values);
    give(std::move(tensor), receive, user);
}

} // namespace sd
