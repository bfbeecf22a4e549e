// The context as C holds it, and the arguments that several entries share.
#pragma once

#include "c_api/guard.h"
#include "sdcpp_probe.h"

#include "context.h"

struct sd_ctx {
    sd::Context              context;
    std::vector<std::string> reports; // of the LoRAs that acted when they were asked for
    std::string              inspected;
    explicit sd_ctx(const sd::OpenParams & params) : context(params) {}
};

namespace sd {

std::vector<ComponentFile> to_components(const sd_component * from, int n);
std::vector<LoraUse>       to_loras(const sd_lora * from, int n);
Tensor                     to_tensor(const sd_tensor & from);

void give(Tensor tensor, sd_receive receive, void * user);
void give(std::vector<float> values, sd_receive receive, void * user);

} // namespace sd
