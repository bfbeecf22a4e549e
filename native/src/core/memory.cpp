#include "core/memory.h"

#include <fstream>
#include <limits>
#include <string>

namespace sd {

// Linux's own estimate, which counts the page cache as free. Elsewhere allocations fail by themselves.
size_t available_memory() {
    std::ifstream meminfo("/proc/meminfo");
    std::string   word;
    while (meminfo >> word) {
        size_t kilobytes = 0;
        if (word == "MemAvailable:" && meminfo >> kilobytes) {
            return kilobytes << 10;
        }
    }
    return std::numeric_limits<size_t>::max();
}

} // namespace sd
