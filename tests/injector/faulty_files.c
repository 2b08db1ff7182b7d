/* Disks that fail, for tests: a library for LD_PRELOAD that stands before the C library's calls on files.

It counts the calls on files below some folders. At the N-th it kills the process, or lets the call fail, or
writes a part of what it was given. It can also log every call that changes a file, with the data: power.py
rebuilds from that log what a disk holds after a power cut.

A process says what is to happen by variables and a call of injector_arm(); nothing happens before.

    INJECTOR_ROOTS    folders, separated by colons
    INJECTOR_STATE    a file of 4096 bytes, shared by the processes of a case: see `struct state`
    INJECTOR_RANK     whose counter this process uses: 0 to 7; a forked process uses that of its parent
    INJECTOR_KINDS    kinds of calls to count, separated by commas: the names in `kinds` below
    INJECTOR_PATH     how the path of a call ends that counts; without it every path does
    INJECTOR_AT       the number of the call, from 1, that the fault strikes; 0: none
    INJECTOR_FAULT    kill (this process), killall (and every other at its next call), short (write half),
                      stop (send this process SIGTERM and go on), trace (nothing but the lines in
                      INJECTOR_FIRED), or an errno
    INJECTOR_TIMES    how many calls in a row fail; 0: all from then on
    INJECTOR_FIRED    a file that takes a line about each call that was struck (the first 20; of a trace all)
    INJECTOR_LOG      a file that takes the log of changes
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN_WRITE, WRITE, FSYNC, RENAME, LINK, UNLINK, RMDIR, MKDIR, TRUNCATE, CHMOD, CLOSE_WRITE,
            OPEN_READ, READ, MAP, OPENDIR, READDIR, STAT, KINDS };
static const char *const kinds[KINDS] = {
    "open_write", "write", "fsync", "rename", "link", "unlink", "rmdir", "mkdir", "truncate", "chmod",
    "close_write", "open_read", "read", "map", "opendir", "readdir", "stat"};

struct state {
    atomic_ulong count[8];  /* calls so far, of each rank */
    atomic_ulong struck;    /* calls that a fault struck */
    atomic_int dead;        /* every process is to die at its next call */
    atomic_int log_lock;
};

#define SHORT (-1)  /* what strike() answers for a write of a half */

static struct {
    struct state *state;
    char roots[8][PATH_MAX];
    /* no open files, but paths: a process may close every file that it did not open */
    char log[PATH_MAX], fired[PATH_MAX], end[PATH_MAX];
    int root_count, rank;
    unsigned long kinds, at, times;
    int kill, kill_all, short_write, stop, trace, error;
} with;

#define REAL(result, name, ...)                                             \
    static result (*real)(__VA_ARGS__);                                     \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static int open_append(const char *path) {
    return (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

static unsigned long parse_kinds(const char *list) {
    unsigned long set = 0;
    char copy[512];
    snprintf(copy, sizeof copy, "%s", list ? list : "");
    for (char *rest = copy, *name; (name = strsep(&rest, ","));)
        for (int i = 0; i < KINDS; i++)
            if (!strcmp(name, kinds[i])) set |= 1ul << i;
    return set;
}

int injector_arm(void) {
    const char *path = setting("INJECTOR_STATE"), *roots = setting("INJECTOR_ROOTS");
    if (!path || !roots) return 1;
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return 2;
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (memory == MAP_FAILED) return 3;
    char copy[8 * PATH_MAX];
    snprintf(copy, sizeof copy, "%s", roots);
    with.root_count = 0;
    for (char *rest = copy, *root; (root = strsep(&rest, ":")) && with.root_count < 8;)
        snprintf(with.roots[with.root_count++], PATH_MAX, "%s", root);
    const char *rank = setting("INJECTOR_RANK"), *at = setting("INJECTOR_AT");
    const char *times = setting("INJECTOR_TIMES");
    const char *fault = setting("INJECTOR_FAULT");
    with.rank = rank ? atoi(rank) & 7 : 0;
    with.at = at ? strtoul(at, NULL, 10) : 0;
    with.times = times ? strtoul(times, NULL, 10) : 1;
    with.kinds = parse_kinds(setting("INJECTOR_KINDS"));
    with.kill = fault && !strcmp(fault, "kill");
    with.kill_all = fault && !strcmp(fault, "killall");
    with.short_write = fault && !strcmp(fault, "short");
    with.stop = fault && !strcmp(fault, "stop");
    with.trace = fault && !strcmp(fault, "trace");
    with.error = fault ? atoi(fault) : 0;
    const char *log = setting("INJECTOR_LOG"), *fired = setting("INJECTOR_FIRED");
    const char *end = setting("INJECTOR_PATH");
    snprintf(with.end, PATH_MAX, "%s", end ? end : "");
    snprintf(with.log, PATH_MAX, "%s", log ? log : "");
    snprintf(with.fired, PATH_MAX, "%s", fired ? fired : "");
    with.state = memory;
    return 0;
}

__attribute__((constructor)) static void arm_at_start(void) {  /* in a program that an armed process starts */
    if (setting("INJECTOR_ARMED")) injector_arm();
}

/* ---- paths --------------------------------------------------------------------------------------------- */

static int below_roots(const char *path) {
    for (int i = 0; i < with.root_count; i++) {
        size_t length = strlen(with.roots[i]);
        if (!strncmp(path, with.roots[i], length) && (path[length] == '/' || !path[length])) return 1;
    }
    return 0;
}

static int path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path[0] == '/' && below_roots(path);
}

/* Whether the name, given to a call like openat, is below the roots; then `path` takes it whole. */
static int path_of_name(int folder, const char *name, char *path) {
    if (!name) return 0;
    char place[PATH_MAX];
    if (name[0] == '/')
        snprintf(path, PATH_MAX, "%s", name);
    else {
        if (folder == AT_FDCWD) {
            if (syscall(SYS_getcwd, place, sizeof place) < 0) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, place, PATH_MAX - 1);
            if (length < 0) return 0;
            place[length] = 0;
        }
        if (!*name || !strcmp(name, "."))
            snprintf(path, PATH_MAX, "%s", place);
        else if (snprintf(path, PATH_MAX, "%s/%s", place, name) >= PATH_MAX)
            return 0;
    }
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') path[--length] = 0;
    return below_roots(path);
}

/* ---- the fault ----------------------------------------------------------------------------------------- */

static void die(void) {
    syscall(SYS_kill, (int)syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

static void report(enum kind kind, const char *path, unsigned long number) {
    char line[PATH_MAX + 100];
    int length = snprintf(line, sizeof line, "%lu\t%s\t%s\n", number, kinds[kind], path);
    int file = *with.fired ? open_append(with.fired) : -1;
    if (file < 0 || length < 0) return;
    syscall(SYS_write, file, line, (size_t)length);
    syscall(SYS_close, file);
}

static int ends_as_asked(const char *path) {
    size_t length = strlen(path), end = strlen(with.end);
    return length >= end && !strcmp(path + length - end, with.end);
}

/* Count a call. 0: let it go on; SHORT: do half of it; else: fail with this errno. */
static int strike(enum kind kind, const char *path) {
    if (!with.state) return 0;
    if (atomic_load(&with.state->dead)) die();
    if (!(with.kinds >> kind & 1) || !ends_as_asked(path)) return 0;
    unsigned long number = atomic_fetch_add(&with.state->count[with.rank], 1) + 1;
    if (!with.at || number < with.at || (with.times && number >= with.at + with.times)) return 0;
    if (atomic_fetch_add(&with.state->struck, 1) < 20 || with.trace) report(kind, path, number);
    if (with.kill_all) atomic_store(&with.state->dead, 1);
    if (with.kill || with.kill_all) die();
    if (with.stop) syscall(SYS_kill, (int)syscall(SYS_getpid), SIGTERM);
    if (with.short_write) return kind == WRITE ? SHORT : 0;
    return with.error;
}

/* ---- the log ------------------------------------------------------------------------------------------- */

/* A change and its line in the log happen together, so that the log has the order of the changes. */
static int begin_change(void) {
    if (!*with.log || !with.state) return 0;
    while (atomic_exchange(&with.state->log_lock, 1)) sched_yield();
    return 1;
}

static void end_change(int logs) {
    if (logs) atomic_store(&with.state->log_lock, 0);
}

static void write_whole(int file, const void *data, size_t size) {
    while (size > 0) {
        ssize_t n = syscall(SYS_write, file, data, size);
        if (n <= 0) abort();
        data = (const char *)data + n;
        size -= (size_t)n;
    }
}

/* One line, and `size` bytes of data. */
static void log_change(const char *what, ino_t inode, long long offset, size_t size, const void *data,
                       const char *path, const char *target) {
    char line[2 * PATH_MAX + 200];
    int length = snprintf(line, sizeof line, "%s\t%llu\t%lld\t%zu\t%s\t%s\n", what,
                          (unsigned long long)inode, offset, data ? size : 0, path ? path : "",
                          target ? target : "");
    int file = open_append(with.log);
    if (file < 0) abort();
    write_whole(file, line, (size_t)length);
    if (data) write_whole(file, data, size);
    syscall(SYS_close, file);
}

static ino_t inode_of_fd(int fd) {
    struct stat s;
    return syscall(SYS_newfstatat, fd, "", &s, AT_EMPTY_PATH) ? 0 : s.st_ino;
}

static ino_t inode_of_path(const char *path) {
    struct stat s;
    return syscall(SYS_newfstatat, AT_FDCWD, path, &s, AT_SYMLINK_NOFOLLOW) ? 0 : s.st_ino;
}

/* A call on names: `call` is made, or fails as strike() says; if it succeeds, `logged` is. */
#define GUARD(kind, path, logged, call)              \
    int fault = strike(kind, path);                  \
    if (fault > 0) { errno = fault; return -1; }     \
    int logs = begin_change();                       \
    int result = (call);                             \
    int error = errno;                               \
    if (logs && result >= 0) logged;                 \
    end_change(logs);                                \
    errno = error;                                   \
    return result

/* ---- calls on names ------------------------------------------------------------------------------------ */

static int open_any(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!with.state || !path_of_name(folder, name, path))
        return (int)syscall(SYS_openat, folder, name, flags, mode);
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    enum kind kind = writes ? OPEN_WRITE : flags & O_DIRECTORY ? OPENDIR : OPEN_READ;
    int fault = strike(kind, path);
    if (fault > 0) { errno = fault; return -1; }
    int logs = writes && begin_change();
    ino_t before = logs ? inode_of_path(path) : 0;
    int fd = (int)syscall(SYS_openat, folder, name, flags, mode);
    int error = errno;
    if (logs && fd >= 0 && !before && flags & O_CREAT)
        log_change("create", inode_of_fd(fd), 0, 0, NULL, path, NULL);
    if (logs && fd >= 0 && before && flags & O_TRUNC)
        log_change("truncate", inode_of_fd(fd), 0, 0, NULL, path, NULL);
    end_change(logs);
    errno = error;
    return fd;
}

#define MODE_ARGUMENT                                      \
    mode_t mode = 0;                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                   \
        va_list rest;                                      \
        va_start(rest, flags);                             \
        mode = va_arg(rest, mode_t);                       \
        va_end(rest);                                      \
    }

int open(const char *name, int flags, ...) { MODE_ARGUMENT return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE_ARGUMENT return open_any(AT_FDCWD, name, flags, mode); }
int openat(int place, const char *name, int flags, ...) {
    MODE_ARGUMENT return open_any(place, name, flags, mode);
}
int openat64(int place, const char *name, int flags, ...) {
    MODE_ARGUMENT return open_any(place, name, flags, mode);
}
#define CREAT (O_CREAT | O_WRONLY | O_TRUNC)
int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, CREAT, mode); }
int creat64(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, CREAT, mode); }

static FILE *fopen_any(const char *symbol, const char *name, const char *mode) {
    typedef FILE *function(const char *, const char *);
    function *real = (function *)dlsym(RTLD_NEXT, symbol);
    char path[PATH_MAX];
    if (with.state && path_of_name(AT_FDCWD, name, path)) {
        int fault = strike(strpbrk(mode, "wa+") ? OPEN_WRITE : OPEN_READ, path);
        if (fault > 0) { errno = fault; return NULL; }
    }
    return real(name, mode);
}
FILE *fopen(const char *name, const char *mode) { return fopen_any("fopen", name, mode); }
FILE *fopen64(const char *name, const char *mode) { return fopen_any("fopen64", name, mode); }

size_t fread(void *data, size_t size, size_t count, FILE *file) {
    REAL(size_t, "fread", void *, size_t, size_t, FILE *);
    char path[PATH_MAX];
    int fd = with.state && file ? fileno(file) : -1;
    if (fd >= 0 && path_of_fd(fd, path)) {
        int fault = strike(READ, path);
        if (fault > 0) { errno = fault; return 0; }
    }
    return real(data, size, count, file);
}

static int rename_any(int folder, const char *name, int new_folder, const char *new_name, unsigned flags) {
    char path[PATH_MAX], target[PATH_MAX];
    if (!with.state || !path_of_name(new_folder, new_name, target) || !path_of_name(folder, name, path))
        return (int)syscall(SYS_renameat2, folder, name, new_folder, new_name, flags);
    GUARD(RENAME, target, log_change("rename", 0, 0, 0, NULL, path, target),
          (int)syscall(SYS_renameat2, folder, name, new_folder, new_name, flags));
}
int rename(const char *a, const char *b) { return rename_any(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int f, const char *a, int g, const char *b) { return rename_any(f, a, g, b, 0); }
int renameat2(int f, const char *a, int g, const char *b, unsigned flags) {
    return rename_any(f, a, g, b, flags);
}

static int link_any(int folder, const char *name, int new_folder, const char *new_name, int flags) {
    char path[PATH_MAX], target[PATH_MAX];
    if (!with.state || !path_of_name(new_folder, new_name, target) || !path_of_name(folder, name, path))
        return (int)syscall(SYS_linkat, folder, name, new_folder, new_name, flags);
    GUARD(LINK, target, log_change("link", 0, 0, 0, NULL, path, target),
          (int)syscall(SYS_linkat, folder, name, new_folder, new_name, flags));
}
int link(const char *a, const char *b) { return link_any(AT_FDCWD, a, AT_FDCWD, b, 0); }
int linkat(int f, const char *a, int g, const char *b, int flags) { return link_any(f, a, g, b, flags); }

int symlinkat(const char *content, int folder, const char *name) {
    char path[PATH_MAX];
    if (!with.state || !path_of_name(folder, name, path))
        return (int)syscall(SYS_symlinkat, content, folder, name);
    GUARD(LINK, path, log_change("symlink", 0, 0, 0, NULL, path, content),
          (int)syscall(SYS_symlinkat, content, folder, name));
}
int symlink(const char *content, const char *name) { return symlinkat(content, AT_FDCWD, name); }

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!with.state || !path_of_name(folder, name, path))
        return (int)syscall(SYS_unlinkat, folder, name, flags);
    int is_folder = flags & AT_REMOVEDIR;
    const char *what = is_folder ? "rmdir" : "unlink";
    GUARD(is_folder ? RMDIR : UNLINK, path, log_change(what, 0, 0, 0, NULL, path, NULL),
          (int)syscall(SYS_unlinkat, folder, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
    int result = unlinkat(AT_FDCWD, name, 0);
    return result && errno == EISDIR ? unlinkat(AT_FDCWD, name, AT_REMOVEDIR) : result;
}

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    if (!with.state || !path_of_name(folder, name, path))
        return (int)syscall(SYS_mkdirat, folder, name, mode);
    GUARD(MKDIR, path, log_change("mkdir", inode_of_path(path), 0, 0, NULL, path, NULL),
          (int)syscall(SYS_mkdirat, folder, name, mode));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int fchmodat(int folder, const char *name, mode_t mode, int flags) {
    REAL(int, "fchmodat", int, const char *, mode_t, int);
    char path[PATH_MAX];
    if (!with.state || !path_of_name(folder, name, path)) return real(folder, name, mode, flags);
    int fault = strike(CHMOD, path);
    if (fault > 0) { errno = fault; return -1; }
    return real(folder, name, mode, flags);
}
int chmod(const char *name, mode_t mode) { return fchmodat(AT_FDCWD, name, mode, 0); }

/* ---- calls on open files ------------------------------------------------------------------------------- */

/* Log `n` bytes that were just written; offset < 0: where the file's position came from. */
static void log_written(int fd, const void *data, ssize_t n, long long offset) {
    if (n <= 0) return;
    if (offset < 0) offset = (long long)syscall(SYS_lseek, fd, 0, SEEK_CUR) - n;
    log_change("write", inode_of_fd(fd), offset, (size_t)n, data, NULL, NULL);
}

static ssize_t write_any(int fd, const void *data, size_t size, long long offset) {
    char path[PATH_MAX];
    int counted = with.state && path_of_fd(fd, path);
    int fault = counted ? strike(WRITE, path) : 0;
    if (fault > 0) { errno = fault; return -1; }
    if (fault == SHORT) size = (size + 1) / 2;
    int logs = counted && begin_change();
    ssize_t n;
    if (offset < 0)
        n = syscall(SYS_write, fd, data, size);
    else
        n = syscall(SYS_pwrite64, fd, data, size, offset);
    int error = errno;
    if (logs) log_written(fd, data, n, offset);
    end_change(logs);
    errno = error;
    return n;
}
ssize_t write(int fd, const void *data, size_t size) { return write_any(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    return write_any(fd, data, size, place);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    return write_any(fd, data, size, place);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    if (!with.state || !path_of_fd(fd, path)) return syscall(SYS_writev, fd, parts, count);
    ssize_t total = 0;  /* one write after the other: writev may write less than all */
    for (int i = 0; i < count; i++) {
        if (!parts[i].iov_len) continue;
        ssize_t n = write_any(fd, parts[i].iov_base, parts[i].iov_len, -1);
        if (n < 0) return total ? total : -1;
        total += n;
        if ((size_t)n < parts[i].iov_len) break;
    }
    return total;
}

/* The kernel's ways to copy a file are refused, so that the caller reads and writes. */
ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    char path[PATH_MAX];
    if (with.state && (path_of_fd(out, path) || path_of_fd(in, path))) { errno = ENOTSOCK; return -1; }
    return syscall(SYS_sendfile, out, in, offset, count);
}
ssize_t sendfile64(int out, int in, off64_t *place, size_t count) { return sendfile(out, in, place, count); }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t size, unsigned flags) {
    char path[PATH_MAX];
    if (with.state && (path_of_fd(out, path) || path_of_fd(in, path))) { errno = EXDEV; return -1; }
    return syscall(SYS_copy_file_range, in, a, out, b, size, flags);
}

static int sync_any(int fd, long call) {
    char path[PATH_MAX];
    if (!with.state || !path_of_fd(fd, path)) return (int)syscall(call, fd);
    GUARD(FSYNC, path, log_change("fsync", inode_of_fd(fd), 0, 0, NULL, path, NULL), (int)syscall(call, fd));
}
int fsync(int fd) { return sync_any(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_any(fd, SYS_fdatasync); }

static int truncate_fd(int fd, long long size) {
    char path[PATH_MAX];
    if (!with.state || !path_of_fd(fd, path)) return (int)syscall(SYS_ftruncate, fd, size);
    GUARD(TRUNCATE, path, log_change("truncate", inode_of_fd(fd), size, 0, NULL, path, NULL),
          (int)syscall(SYS_ftruncate, fd, size));
}
int ftruncate(int fd, off_t size) { return truncate_fd(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_fd(fd, size); }

static int truncate_name(const char *name, long long size) {
    char path[PATH_MAX];
    if (!with.state || !path_of_name(AT_FDCWD, name, path)) return (int)syscall(SYS_truncate, name, size);
    GUARD(TRUNCATE, path, log_change("truncate", inode_of_path(path), size, 0, NULL, path, NULL),
          (int)syscall(SYS_truncate, name, size));
}
int truncate(const char *name, off_t size) { return truncate_name(name, size); }
int truncate64(const char *name, off64_t size) { return truncate_name(name, size); }

/* Some network file systems tell of a failed write only here. */
int close(int fd) {
    char path[PATH_MAX];
    int counted = with.state && with.kinds >> CLOSE_WRITE & 1 && path_of_fd(fd, path);
    if (counted && (syscall(SYS_fcntl, fd, F_GETFL) & O_ACCMODE) == O_RDONLY) counted = 0;
    int fault = counted ? strike(CLOSE_WRITE, path) : 0;
    int result = (int)syscall(SYS_close, fd);
    if (fault > 0) { errno = fault; return -1; }
    return result;
}

static ssize_t read_any(int fd, void *data, size_t size, long long offset) {
    char path[PATH_MAX];
    if (with.state && path_of_fd(fd, path)) {
        int fault = strike(READ, path);
        if (fault > 0) { errno = fault; return -1; }
    }
    return offset < 0 ? syscall(SYS_read, fd, data, size) : syscall(SYS_pread64, fd, data, size, offset);
}
ssize_t read(int fd, void *data, size_t size) { return read_any(fd, data, size, -1); }
ssize_t pread(int fd, void *data, size_t size, off_t offset) { return read_any(fd, data, size, offset); }
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) { return read_any(fd, data, size, offset); }

static void *map_any(void *address, size_t size, int protection, int flags, int fd, long long offset) {
    char path[PATH_MAX];
    if (with.state && fd >= 0 && !(flags & MAP_ANONYMOUS) && path_of_fd(fd, path)) {
        int fault = strike(MAP, path);
        if (fault > 0) { errno = fault; return MAP_FAILED; }
    }
    return (void *)syscall(SYS_mmap, address, size, protection, flags, fd, offset);
}
void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    return map_any(address, size, protection, flags, fd, offset);
}
void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t offset) {
    return map_any(address, size, protection, flags, fd, offset);
}

/* ---- folders ------------------------------------------------------------------------------------------- */

DIR *opendir(const char *name) {
    REAL(DIR *, "opendir", const char *);
    char path[PATH_MAX];
    if (with.state && path_of_name(AT_FDCWD, name, path)) {
        int fault = strike(OPENDIR, path);
        if (fault > 0) { errno = fault; return NULL; }
    }
    return real(name);
}
DIR *fdopendir(int fd) {
    REAL(DIR *, "fdopendir", int);
    char path[PATH_MAX];
    if (with.state && path_of_fd(fd, path)) {
        int fault = strike(OPENDIR, path);
        if (fault > 0) { errno = fault; return NULL; }
    }
    return real(fd);
}

/* ENOENT: the listing ends early, as that of a network file system may after another machine added names. */
#define READ_FOLDER(type, name)                                          \
    type *name(DIR *folder) {                                            \
        REAL(type *, #name, DIR *);                                      \
        char path[PATH_MAX];                                             \
        if (with.state && path_of_fd(dirfd(folder), path)) {   \
            int fault = strike(READDIR, path);                           \
            if (fault > 0) {                                             \
                errno = fault == ENOENT ? 0 : fault;                     \
                return NULL;                                             \
            }                                                            \
        }                                                                \
        return real(folder);                                             \
    }
READ_FOLDER(struct dirent, readdir)
READ_FOLDER(struct dirent64, readdir64)

#define STRIKE_STAT(condition)                                \
    char path[PATH_MAX];                                      \
    if (with.state && (condition)) {                          \
        int fault = strike(STAT, path);                       \
        if (fault > 0) { errno = fault; return -1; }          \
    }
#define STAT_CALLS(type, stat_, lstat_, fstat_, fstatat_)                                                  \
    int stat_(const char *name, type *s) {                                                                 \
        STRIKE_STAT(path_of_name(AT_FDCWD, name, path))                                                    \
        return (int)syscall(SYS_newfstatat, AT_FDCWD, name, s, 0);                                         \
    }                                                                                                      \
    int lstat_(const char *name, type *s) {                                                                \
        STRIKE_STAT(path_of_name(AT_FDCWD, name, path))                                                    \
        return (int)syscall(SYS_newfstatat, AT_FDCWD, name, s, AT_SYMLINK_NOFOLLOW);                       \
    }                                                                                                      \
    int fstat_(int fd, type *s) {                                                                          \
        STRIKE_STAT(path_of_fd(fd, path))                                                                  \
        return (int)syscall(SYS_newfstatat, fd, "", s, AT_EMPTY_PATH);                                     \
    }                                                                                                      \
    int fstatat_(int fd, const char *name, type *s, int flags) {                                           \
        STRIKE_STAT(path_of_name(fd, name, path))                                                          \
        return (int)syscall(SYS_newfstatat, fd, name, s, flags);                                           \
    }
STAT_CALLS(struct stat, stat, lstat, fstat, fstatat)
STAT_CALLS(struct stat64, stat64, lstat64, fstat64, fstatat64)
int access(const char *name, int mode) {
    STRIKE_STAT(path_of_name(AT_FDCWD, name, path))
    return (int)syscall(SYS_faccessat, AT_FDCWD, name, mode);
}
