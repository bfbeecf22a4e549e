// Messages of one context. Nothing is logged by the process as a whole.
#pragma once

#include <functional>
#include <string>

namespace sd {

enum class Level { debug = 0, info, warning, error };

using Log = std::function<void(Level, const std::string &)>;

} // namespace sd
