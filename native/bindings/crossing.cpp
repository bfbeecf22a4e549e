#include "crossing.h"

#include <cstring>

namespace binding {

py::str text(const char * utf8) {
    const char * given = utf8 ? utf8 : "";
    return py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(given, static_cast<Py_ssize_t>(std::strlen(given)), "replace"));
}

py::object text_or_none(const char * utf8) { return utf8 ? py::object(text(utf8)) : py::none(); }

[[noreturn]] void raise(sd_status status, const py::str & message) {
    const py::object exception =
        py::module_::import("sdcpp_py.errors").attr("from_status")(static_cast<int>(status), message);
    PyErr_SetObject(py::type::of(exception).ptr(), exception.ptr());
    throw py::error_already_set();
}

void check(sd_status status) {
    if (status != SD_OK) {
        raise(status, text(sd_last_error()));
    }
}

const char * c_text(const std::string & value, const char * argument) {
    if (value.find('\0') != std::string::npos) {
        raise(SD_BAD_ARGUMENT,
              py::str("{}: has a NUL character at byte {}; take it out").format(argument, value.find('\0')));
    }
    return value.c_str();
}

const char * c_text(const Name & value, const char * argument) {
    return value ? c_text(*value, argument) : nullptr;
}

py::tuple numpy_shape(const int64_t (&ne)[4], int dims) { // dims < 0: not known
    if (dims < 0) {
        dims = 4;
        while (dims > 1 && ne[dims - 1] == 1) {
            dims--;
        }
    }
    dims = std::min(dims, 4);
    py::tuple shape(dims);
    for (int i = 0; i < dims; i++) {
        shape[static_cast<size_t>(i)] = ne[dims - 1 - i];
    }
    return shape;
}

} // namespace binding
