#include "lora/lora_file.h"

#include "core/utf8.h"
#include "core/words.h"

#include <cmath>
#include <cstdio>

namespace sd {
namespace {

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char c : is_utf8(text) ? text : printable(text)) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
            out += escaped;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

std::string json(const std::string & text) { return quoted(text); }
std::string json(int number) { return std::to_string(number); }
std::string json(double number) { return std::isfinite(number) ? number_text(number) : "null"; }

std::string json(const std::vector<std::string> & list) {
    std::string out = "[";
    for (size_t i = 0; i < list.size(); ++i) {
        out += (i ? "," : "") + quoted(list[i]);
    }
    return out + "]";
}

const std::string & key_text(const std::string & key) { return key; }
std::string key_text(int64_t key) { return std::to_string(key); }

template <typename Key, typename Value>
std::string json(const std::map<Key, Value> & map) {
    std::string out;
    for (const auto & [key, value] : map) {
        out += (out.empty() ? "" : ",") + quoted(key_text(key)) + ":" + json(value);
    }
    return "{" + out + "}";
}

} // namespace

std::string report_json(const LoraReport & report) {
    std::string out;
    const auto member = [&](const char * name, const auto & value) {
        out += (out.empty() ? "{\"" : ",\"") + std::string(name) + "\":" + json(value);
    };
    member("path", report.path);
    member("base_model", report.base_model);
    member("settings", report.settings);
    member("formats", report.formats);
    member("kinds", report.kinds);
    member("ranks", report.ranks);
    member("scale_min", report.scale_min);
    member("scale_max", report.scale_max);
    member("text_modules", report.text_modules);
    member("unet_modules", report.unet_modules);
    member("applied", report.applied);
    member("padded", report.padded);
    member("skipped", report.skipped);
    member("unmatched", report.unmatched);
    member("absent", report.absent);
    member("warnings", report.warnings);
    member("metadata", report.metadata);
    return out + "}";
}

} // namespace sd
