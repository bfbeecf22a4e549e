// Tables whose rows begin with a name: the lists that users see, and errors cite, come from there.
#pragma once

#include "core/error.h"

#include <cstddef>
#include <string>
#include <vector>

namespace sd {

template <typename Row, size_t size>
std::vector<std::string> names_of(const Row (&table)[size]) {
    std::vector<std::string> names;
    for (const Row & row : table) {
        names.push_back(row.name);
    }
    return names;
}

// Throws Error(bad_argument) that lists the names; `what` is the argument, as the user knows it.
template <typename Row, size_t size>
const Row & find_named(const char * what, const Row (&table)[size], const std::string & name) {
    std::string known;
    for (const Row & row : table) {
        if (name == row.name) {
            return row;
        }
        known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    fail(Status::bad_argument, "%s '%s' is not known; there are: %s", what, name.c_str(), known.c_str());
}

} // namespace sd
