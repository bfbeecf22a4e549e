// A file mapped for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sd {

class MappedFile {
  public:
    // Throws Error(io) where the file can't be opened or mapped, Error(bad_file) where it is empty or no
    // regular file. Paths are UTF-8.
    explicit MappedFile(const std::string & path);
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile & operator=(const MappedFile &) = delete;

    const std::string & path() const { return path_; }
    const uint8_t *     data() const { return data_; }
    size_t              size() const { return size_; }

    // Whether the mapped file still has the size and the modification time that it had when it was opened.
    // A file that was deleted or replaced by another one of the same name stays as it was: we hold it open.
    bool unchanged() const;

  private:
    void map();
    void release();

    std::string     path_;
    intptr_t        handle_; // the descriptor, on Windows the HANDLE
    const uint8_t * data_ = nullptr;
    size_t          size_ = 0;
    int64_t         modified_ = 0; // in the system's own unit
};

} // namespace sd
