// A folder that vanishes with the test, and the bytes of small checkpoints.
#pragma once

#include "checkpoint/checkpoint.h"
#include "core/error.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>

namespace sd::test {

class Folder {
  public:
    Folder() {
        static std::atomic<int> made{0};
        const auto              now = std::chrono::steady_clock::now().time_since_epoch().count();
        root_ = std::filesystem::temp_directory_path() /
                ("sdcpp-test-" + std::to_string(now) + "-" + std::to_string(made++));
        std::filesystem::create_directories(root_);
    }
    ~Folder() {
        std::error_code ignored;
        std::filesystem::remove_all(root_, ignored);
    }
    Folder(const Folder &) = delete;
    Folder & operator=(const Folder &) = delete;

    std::string path(const std::string & name = "") const { return (root_ / name).string(); }

    // Writes a file, with the folders that it needs, and returns its path.
    std::string write(const std::string & name, const std::string & bytes) const {
        std::filesystem::create_directories((root_ / name).parent_path());
        std::ofstream(root_ / name, std::ios::binary) << bytes;
        return path(name);
    }

  private:
    std::filesystem::path root_;
};

inline std::string little(uint64_t number, int bytes) {
    std::string out;
    for (int i = 0; i < bytes; ++i) {
        out += static_cast<char>(number >> (8 * i));
    }
    return out;
}

inline std::string safetensors(const std::string & header, const std::string & data) {
    return little(header.size(), 8) + header + data;
}

// One F32 of value 0 for each name.
inline std::string safetensors_of(const std::vector<std::string> & names) {
    std::string header = "{";
    for (size_t i = 0; i < names.size(); ++i) {
        header += (i ? ",\"" : "\"") + names[i] + "\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[" +
                  std::to_string(4 * i) + "," + std::to_string(4 * i + 4) + "]}";
    }
    return safetensors(header + "}", std::string(4 * names.size(), '\0'));
}

inline std::string bytes_of(const StoredTensor & tensor) {
    return {reinterpret_cast<const char *>(tensor.data()), tensor.bytes};
}

// What the action complains about; "" where it does not.
template <typename Action> std::string complaint(Action action, Status status) {
    try {
        action();
    } catch (const Error & error) {
        INFO(error.what());
        CHECK(static_cast<int>(error.status) == static_cast<int>(status));
        return error.what();
    }
    return "";
}

inline std::string open_complaint(const std::string & path, Status status = Status::bad_file) {
    return complaint([&] { Checkpoint::open(path); }, status);
}

inline bool contains(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

} // namespace sd::test
