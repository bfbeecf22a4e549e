// What every crossing between Python and C needs: text, statuses as exceptions, what a callback raised.
#pragma once

#include "sdcpp.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace binding {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Name = std::optional<std::string>;
using Sizes = std::vector<py::ssize_t>; // in numpy's order

py::str text(const char * utf8);
py::object text_or_none(const char * utf8);

[[noreturn]] void raise(sd_status status, const py::str & message);

// The one place where a status becomes an exception.
void check(sd_status status);

// Calls C with the GIL let go.
template <class Call>
sd_status released(Call && call) {
    const py::gil_scoped_release release;
    return call();
}

// A shape in numpy's order; `dims` < 0: as many as the last that is not 1.
py::tuple numpy_shape(const int64_t (&ne)[4], int dims);

// A string as C takes it: it has no byte 0. Null where there is no name.
const char * c_text(const std::string & value, const char * argument);
const char * c_text(const Name & value, const char * argument);

// What a callback raised waits here until the C frames between it and Python are gone.
class Raised {
  public:
    // Calls `work` with the GIL held; false where it raised, now or before.
    template <class Work>
    bool guard(Work && work) {
        const py::gil_scoped_acquire gil;
        if (raised_) {
            return false;
        }
        try {
            return work();
        } catch (...) {
            raised_ = std::current_exception();
            return false;
        }
    }

    void rethrow() {
        if (raised_) {
            std::rethrow_exception(std::exchange(raised_, nullptr));
        }
    }

  private:
    std::exception_ptr raised_;
};

} // namespace binding
