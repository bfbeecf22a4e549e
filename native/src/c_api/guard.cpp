#include "c_api/guard.h"

namespace sd {

static_assert(static_cast<int>(Status::internal) == SD_INTERNAL && static_cast<int>(Status::io) == SD_IO &&
                  static_cast<int>(Status::cancelled) == SD_CANCELLED,
              "Status carries sd_status's numbers");

namespace {

thread_local std::string last_error;

} // namespace

sd_status failed(sd_status status, const std::string & message) {
    last_error = message;
    return status;
}

} // namespace sd

const char * sd_last_error(void) { return sd::last_error.c_str(); }
