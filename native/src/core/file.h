// A file's bytes for reading: mapped, or read into memory of our own where the file may change or vanish.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sd {

class MappedFile {
  public:
    // Throws Error(io) where the file can't be opened, mapped or read, Error(bad_file) where it is empty or no
    // regular file, Error(out_of_memory) where it is to be `in_ram` and has no room there. Paths are UTF-8.
    explicit MappedFile(const std::string & path, bool in_ram = false);
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile & operator=(const MappedFile &) = delete;

    const std::string & path() const { return path_; }
    const uint8_t *     data() const { return data_; }
    size_t              size() const { return size_; }
    bool                in_ram() const { return in_ram_; }

    // Takes a range out of this process's memory; whoever looks there again gets it from the system's cache or from disk.
    // Nothing where the file is in RAM, or where the system has no such call and decides by itself.
    void forget(size_t offset, size_t bytes) const;

    // Whether the mapped file still has the size and the modification time that it had when it was opened.
    // A file that was deleted or replaced by another one of the same name stays as it was: we hold it open.
    // What is in RAM always stays as it was.
    bool unchanged() const;

  private:
    void examine();
    void map();
    void read();
    bool is_as_opened() const;
    void release_data();
    void close_file();

    std::string     path_;
    intptr_t        handle_; // the descriptor, on Windows the HANDLE; -1: closed
    bool            in_ram_;
    const uint8_t * data_ = nullptr;
    size_t          size_ = 0;
    int64_t         modified_ = 0; // in the system's own unit
};

// All of a small file that describes others, such as a config. Throws as MappedFile does, and Error(bad_file) where it
// has more than `most` bytes.
std::string read_text(const std::string & path, size_t most);

} // namespace sd
