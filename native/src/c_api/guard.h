// What every entry of the C surface starts with: its arguments are there, and no exception leaves it.
#pragma once

#include "sdcpp.h"

#include "core/error.h"

#include <exception>
#include <new>
#include <string>
#include <vector>

namespace sd {

// Keeps the sentence for sd_last_error() of this thread; returns the status.
sd_status failed(sd_status status, const std::string & message);

// The only place where exceptions end.
template <typename Function> sd_status guarded(Function && function) {
    failed(SD_OK, {});
    try {
        function();
        return SD_OK;
    } catch (const Error & error) {
        return failed(static_cast<sd_status>(error.status), error.what());
    } catch (const std::bad_alloc &) {
        return failed(SD_OUT_OF_MEMORY, "memory could not be had; try a smaller picture or batch");
    } catch (const std::exception & error) {
        return failed(SD_INTERNAL, std::string("this should not happen, please report it: ") + error.what());
    } catch (...) {
        return failed(SD_INTERNAL, "this should not happen, please report it: an exception of an unknown kind");
    }
}

inline std::string or_empty(const char * text) { return text ? text : ""; }

inline void need(const void * pointer, const char * what) {
    if (!pointer) {
        fail(Status::bad_argument, "%s is NULL", what);
    }
}

template <typename Entries> bool is_index(const Entries & entries, int index) {
    return index >= 0 && static_cast<size_t>(index) < entries.size();
}

inline const char * name_at(const std::vector<std::string> & names, int index) {
    return is_index(names, index) ? names[index].c_str() : nullptr;
}

} // namespace sd
