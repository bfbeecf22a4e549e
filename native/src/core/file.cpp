#include "core/file.h"

#include "core/error.h"

#include <system_error>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace sd {
namespace {

[[noreturn]] void refuse(const std::string & path, const char * what, int code) {
    fail(Status::io, "%s: cannot be %s: %s", path.c_str(), what,
         std::system_category().message(code).c_str());
}

[[noreturn]] void refuse_empty(const std::string & path) {
    fail(Status::bad_file, "%s: is empty; the download was probably cut", path.c_str());
}

} // namespace

#if defined(_WIN32)

namespace {

HANDLE as_handle(intptr_t handle) { return reinterpret_cast<HANDLE>(handle); }

std::wstring wide(const std::string & path) {
    const int    size = static_cast<int>(path.size());
    const int    length = MultiByteToWideChar(CP_UTF8, 0, path.data(), size, nullptr, 0);
    std::wstring out(static_cast<size_t>(length), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, path.data(), size, out.data(), length);
    return out;
}

int64_t modified(HANDLE handle) {
    FILETIME time = {};
    GetFileTime(handle, nullptr, nullptr, &time);
    return static_cast<int64_t>(static_cast<uint64_t>(time.dwHighDateTime) << 32 | time.dwLowDateTime);
}

} // namespace

MappedFile::MappedFile(const std::string & path) : path_(path) {
    // Others may read, not write: what is mapped can't change below us.
    const HANDLE handle = CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE,
                                      nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
    if (handle == INVALID_HANDLE_VALUE) {
        refuse(path, "opened", static_cast<int>(GetLastError()));
    }
    handle_ = reinterpret_cast<intptr_t>(handle);
    try {
        map();
    } catch (...) {
        release();
        throw;
    }
}

void MappedFile::map() {
    LARGE_INTEGER size = {};
    if (!GetFileSizeEx(as_handle(handle_), &size)) {
        refuse(path_, "examined", static_cast<int>(GetLastError()));
    }
    if (size.QuadPart == 0) {
        refuse_empty(path_);
    }
    size_ = static_cast<size_t>(size.QuadPart);
    modified_ = modified(as_handle(handle_));
    const HANDLE mapping = CreateFileMappingW(as_handle(handle_), nullptr, PAGE_READONLY, 0, 0, nullptr);
    if (mapping) {
        data_ = static_cast<const uint8_t *>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
    }
    const DWORD code = GetLastError();
    if (mapping) {
        CloseHandle(mapping); // the view keeps what it needs
    }
    if (!data_) {
        refuse(path_, "mapped", static_cast<int>(code));
    }
}

void MappedFile::release() {
    if (data_) {
        UnmapViewOfFile(data_);
    }
    CloseHandle(as_handle(handle_));
}

bool MappedFile::unchanged() const {
    LARGE_INTEGER size = {};
    return GetFileSizeEx(as_handle(handle_), &size) && static_cast<size_t>(size.QuadPart) == size_ &&
           modified(as_handle(handle_)) == modified_;
}

#else

namespace {

int64_t modified(const struct stat & state) {
#if defined(__APPLE__)
    const timespec & time = state.st_mtimespec;
#else
    const timespec & time = state.st_mtim;
#endif
    return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

} // namespace

MappedFile::MappedFile(const std::string & path) : path_(path) {
    // O_NONBLOCK: opening a pipe that nobody writes to would wait for ever; files do not mind.
    handle_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (handle_ < 0) {
        refuse(path, "opened", errno);
    }
    try {
        map();
    } catch (...) {
        release();
        throw;
    }
}

void MappedFile::map() {
    struct stat state = {};
    if (fstat(static_cast<int>(handle_), &state) != 0) {
        refuse(path_, "examined", errno);
    }
    if (!S_ISREG(state.st_mode)) {
        fail(Status::bad_file, "%s: is %s; expected a file", path_.c_str(),
             S_ISDIR(state.st_mode) ? "a folder" : "no regular file");
    }
    if (state.st_size == 0) {
        refuse_empty(path_);
    }
    size_ = static_cast<size_t>(state.st_size);
    modified_ = modified(state);
    void * data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, static_cast<int>(handle_), 0);
    if (data == MAP_FAILED) {
        refuse(path_, "mapped", errno);
    }
    data_ = static_cast<const uint8_t *>(data);
}

void MappedFile::release() {
    if (data_) {
        munmap(const_cast<uint8_t *>(data_), size_);
    }
    close(static_cast<int>(handle_));
}

bool MappedFile::unchanged() const {
    struct stat state = {};
    return fstat(static_cast<int>(handle_), &state) == 0 && static_cast<size_t>(state.st_size) == size_ &&
           modified(state) == modified_;
}

#endif

MappedFile::~MappedFile() { release(); }

} // namespace sd
