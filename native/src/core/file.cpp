#include "core/file.h"

#include "core/error.h"
#include "core/words.h"

#include <algorithm>
#include <filesystem>
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

[[noreturn]] void refuse_changed(const std::string & path) {
    fail(Status::io, "%s: was changed while it was read; open it again", path.c_str());
}

[[noreturn]] void refuse_no_room(const std::string & path, size_t size) {
    fail(Status::out_of_memory, "%s: %zu MB of memory for its contents could not be had", path.c_str(),
         size >> 20);
}

constexpr size_t most_at_once = size_t{1} << 30; // bytes of one read; systems have limits of their own

#if defined(_WIN32)

HANDLE as_handle(intptr_t handle) { return reinterpret_cast<HANDLE>(handle); }

std::wstring wide(const std::string & path) {
    const int size = static_cast<int>(path.size());
    const int length = MultiByteToWideChar(CP_UTF8, 0, path.data(), size, nullptr, 0);
    std::wstring out(static_cast<size_t>(length), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, path.data(), size, out.data(), length);
    return out;
}

int64_t modified(HANDLE handle) {
    FILETIME time = {};
    GetFileTime(handle, nullptr, nullptr, &time);
    return static_cast<int64_t>(static_cast<uint64_t>(time.dwHighDateTime) << 32 | time.dwLowDateTime);
}

intptr_t open_file(const std::string & path) {
    // Others may read, not write: what is mapped can't change below us.
    const HANDLE handle = CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE,
                                      nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
    if (handle == INVALID_HANDLE_VALUE) {
        refuse(path, "opened", static_cast<int>(GetLastError()));
    }
    return reinterpret_cast<intptr_t>(handle);
}

} // namespace

void MappedFile::examine() {
    LARGE_INTEGER size = {};
    if (!GetFileSizeEx(as_handle(handle_), &size)) {
        refuse(path_, "examined", static_cast<int>(GetLastError()));
    }
    if (size.QuadPart == 0) {
        refuse_empty(path_);
    }
    size_ = static_cast<size_t>(size.QuadPart);
    modified_ = modified(as_handle(handle_));
}

void MappedFile::map() {
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

void MappedFile::read() {
    auto * to =
        static_cast<uint8_t *>(VirtualAlloc(nullptr, size_, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
    if (!to) {
        refuse_no_room(path_, size_);
    }
    data_ = to;
    for (size_t at = 0; at < size_;) {
        DWORD got = 0;
        if (!ReadFile(as_handle(handle_), to + at, static_cast<DWORD>(std::min(size_ - at, most_at_once)),
                      &got, nullptr)) {
            refuse(path_, "read", static_cast<int>(GetLastError()));
        }
        if (got == 0) {
            refuse_changed(path_);
        }
        at += got;
    }
}

void MappedFile::release_data() {
    if (data_ && in_ram_) {
        VirtualFree(const_cast<uint8_t *>(data_), 0, MEM_RELEASE);
    } else if (data_) {
        UnmapViewOfFile(data_);
    }
}

void MappedFile::close_file() {
    if (handle_ != -1) {
        CloseHandle(as_handle(handle_));
        handle_ = -1;
    }
}

void MappedFile::forget(size_t, size_t) const {}

bool MappedFile::is_as_opened() const {
    LARGE_INTEGER size = {};
    return GetFileSizeEx(as_handle(handle_), &size) && static_cast<size_t>(size.QuadPart) == size_ &&
           modified(as_handle(handle_)) == modified_;
}

#else

int64_t modified(const struct stat & state) {
#if defined(__APPLE__)
    const timespec & time = state.st_mtimespec;
#else
    const timespec & time = state.st_mtim;
#endif
    return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

intptr_t open_file(const std::string & path) {
    // O_NONBLOCK: opening a pipe that nobody writes to would wait for ever; files do not mind.
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        refuse(path, "opened", errno);
    }
    return descriptor;
}

} // namespace

void MappedFile::examine() {
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
}

void MappedFile::map() {
    void * data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, static_cast<int>(handle_), 0);
    if (data == MAP_FAILED && errno == ENOMEM) {
        refuse_no_room(path_, size_);
    }
    if (data == MAP_FAILED) {
        refuse(path_, "mapped", errno);
    }
    data_ = static_cast<const uint8_t *>(data);
}

void MappedFile::read() {
    void * data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (data == MAP_FAILED) {
        refuse_no_room(path_, size_);
    }
    auto * to = static_cast<uint8_t *>(data);
    data_ = to;
    for (size_t at = 0; at < size_;) {
        const ssize_t got = ::read(static_cast<int>(handle_), to + at, std::min(size_ - at, most_at_once));
        if (got < 0 && errno != EINTR) {
            refuse(path_, "read", errno);
        }
        if (got == 0) {
            refuse_changed(path_);
        }
        at += got > 0 ? static_cast<size_t>(got) : 0;
    }
}

void MappedFile::release_data() {
    if (data_) {
        munmap(const_cast<uint8_t *>(data_), size_);
    }
}

void MappedFile::close_file() {
    if (handle_ != -1) {
        close(static_cast<int>(handle_));
        handle_ = -1;
    }
}

void MappedFile::forget(size_t offset, size_t bytes) const {
    const auto   page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t begin = (offset + page - 1) / page * page, end = (offset + bytes) / page * page;
    if (!in_ram_ && begin < end) { // of memory that no file stands behind it would make zeros
        madvise(const_cast<uint8_t *>(data_) + begin, end - begin, MADV_DONTNEED);
    }
}

bool MappedFile::is_as_opened() const {
    struct stat state = {};
    return fstat(static_cast<int>(handle_), &state) == 0 && static_cast<size_t>(state.st_size) == size_ &&
           modified(state) == modified_;
}

#endif

MappedFile::MappedFile(const std::string & path, bool in_ram)
    : path_(path), handle_(open_file(path)), in_ram_(in_ram) {
    try {
        examine();
        if (!in_ram) {
            map();
            return;
        }
        read();
        if (!is_as_opened()) {
            refuse_changed(path);
        }
        close_file();
    } catch (...) { // without an object there is no destructor
        release_data();
        close_file();
        throw;
    }
}

MappedFile::~MappedFile() {
    release_data();
    close_file();
}

bool MappedFile::unchanged() const { return in_ram_ || is_as_opened(); }

std::string read_text(const std::string & path, size_t most) {
    std::error_code unknown;
    const uintmax_t size = std::filesystem::file_size(std::filesystem::u8path(path), unknown);
    if (!unknown && size > most) {
        fail(Status::bad_file, "%s: has %s bytes, where %s are the most that are read", path.c_str(), grouped(size).c_str(),
             grouped(most).c_str());
    }
    const MappedFile file(path, true);
    return {reinterpret_cast<const char *>(file.data()), file.size()};
}

} // namespace sd
