#include "families/flow_shift.h"

#include "core/error.h"
#include "core/words.h"

#include <cmath>
#include <cstdlib>

namespace sd {
namespace {

constexpr double most_shift = 100; // as for a request

const std::string * find(const Checkpoint & checkpoint, const char * key) {
    const auto found = checkpoint.metadata().find(std::string("scheduler.") + key);
    return found == checkpoint.metadata().end() ? nullptr : &found->second;
}

[[noreturn]] void refuse(const Checkpoint & checkpoint, const char * key, const std::string & value,
                         const char * wanted) {
    fail(Status::bad_file, "%s: scheduler_config.json has the %s '%s'; expected %s", checkpoint.path().c_str(), key,
         printable(value).c_str(), wanted);
}

void read_number(const Checkpoint & checkpoint, const char * key, double least, double most, double & number) {
    const std::string * stated = find(checkpoint, key);
    if (!stated) {
        return;
    }
    char * end = nullptr;
    number = std::strtod(stated->c_str(), &end);
    if (end == stated->c_str() || *end != 0 || !(number >= least && number <= most)) {
        refuse(checkpoint, key, *stated, text("a number between %g and %g", least, most).c_str());
    }
}

} // namespace

FlowShift FlowShift::read(const Checkpoint & checkpoint, FlowShift usual) {
    const double least = 1 / most_shift, most_squares = 1e9;
    read_number(checkpoint, "shift", least, most_shift, usual.fixed);
    read_number(checkpoint, "base_shift", std::log(least), std::log(most_shift), usual.base);
    read_number(checkpoint, "max_shift", std::log(least), std::log(most_shift), usual.most);
    read_number(checkpoint, "base_image_seq_len", 1, most_squares, usual.base_squares);
    read_number(checkpoint, "max_image_seq_len", 1, most_squares, usual.most_squares);
    const std::string * dynamic = find(checkpoint, "use_dynamic_shifting");
    if (dynamic || find(checkpoint, "shift")) {
        usual.grows = dynamic && *dynamic == "true";
    }
    if (usual.grows && usual.base_squares >= usual.most_squares) {
        refuse(checkpoint, "max_image_seq_len", number_text(usual.most_squares), "more than base_image_seq_len");
    }
    const std::string * type = find(checkpoint, "time_shift_type");
    if (usual.grows && type && *type != "exponential") {
        fail(Status::unsupported, "%s: its time_shift_type '%s' is not known here; FLUX and SD3 have 'exponential'",
             checkpoint.path().c_str(), printable(*type).c_str());
    }
    return usual;
}

double FlowShift::of(double squares) const {
    if (!grows) {
        return fixed;
    }
    return std::exp(base + (most - base) * (squares - base_squares) / (most_squares - base_squares));
}

} // namespace sd
