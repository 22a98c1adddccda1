// A disk that is full from a chosen call on, for the files below one directory; see tests/full_disk/__init__.py.
//
// Counted are the calls that need room: creating a file or folder, writing, growing, syncing, renaming. The chosen call
// and all later ones that need room fail with ENOSPC; later renames, which need none, do not.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static size_t below_length;
static struct { long calls, full_from; } *disk;  // shared with the processes that this one forks

void full_disk(const char *directory, long from) {
    if (!disk)
        disk = mmap(NULL, sizeof *disk, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    snprintf(below, sizeof below, "%s/", directory);
    below_length = strlen(below);
    disk->calls = 0;
    disk->full_from = from;  // 0: never
}

long full_disk_calls(void) { return disk ? disk->calls : 0; }

static int path_fails(const char *path, int needs_room) {
    if (!disk || strncmp(path, below, below_length))
        return 0;
    long call = __atomic_add_fetch(&disk->calls, 1, __ATOMIC_SEQ_CST);
    if (disk->full_from && (call == disk->full_from || (call > disk->full_from && needs_room))) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

static int file_fails(int file) {
    char link[64], path[PATH_MAX];
    if (!disk)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return path_fails(path, 1);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CREATES(flags) ((flags) & O_CREAT)

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        return CREATES(flags) && path_fails(path, 1) ? -1 : REAL(name)(path, flags, mode);                             \
    }
#define OPENAT(name)                                                                                                   \
    int name(int at, const char *path, int flags, ...) {                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        return CREATES(flags) && path_fails(path, 1) ? -1 : REAL(name)(at, path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode) {
    return *mode != 'r' && path_fails(path, 1) ? NULL : REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return *mode != 'r' && path_fails(path, 1) ? NULL : REAL(fopen64)(path, mode);
}
ssize_t write(int file, const void *data, size_t size) { return file_fails(file) ? -1 : REAL(write)(file, data, size); }
ssize_t writev(int file, const struct iovec *data, int count) {
    return file_fails(file) ? -1 : REAL(writev)(file, data, count);
}
int fsync(int file) { return file_fails(file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return file_fails(file) ? -1 : REAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { return file_fails(file) ? -1 : REAL(ftruncate)(file, size); }
int mkdir(const char *path, mode_t mode) { return path_fails(path, 1) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return path_fails(to, 0) ? -1 : REAL(rename)(from, to); }
