// Where the time of graphs goes, operation by operation.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace sd {

struct OperationCost {
    int64_t count = 0;
    double  seconds = 0, flops = 0; // of all together; flops are 0 for what moves memory
};

// By network and by what the operation is ("product 320 -> 2560, 8192 rows").
using Profile = std::map<std::pair<std::string, std::string>, OperationCost>;

} // namespace sd
