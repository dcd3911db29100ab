/* Kills the process with SIGKILL at the n-th call, after arm(n), of anything that changes files.
   Even n: before the call happens; odd n: after. Loaded with LD_PRELOAD by test_dist_train_checkpoint_files.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long left = -1;

void arm(long n) { left = n; }

static void boundary(void) {
    if (left >= 0 && left-- == 0) kill(getpid(), SIGKILL);
}

#define WRAP(type, name, parameters, values)                          \
    type name parameters {                                            \
        static type(*real) parameters;                                \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        boundary();                                                   \
        type result = real values;                                    \
        boundary();                                                   \
        return result;                                                \
    }

WRAP(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
WRAP(int, fsync, (int fd), (fd))
WRAP(int, rename, (const char *from, const char *to), (from, to))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode))
WRAP(int, rmdir, (const char *path), (path))
WRAP(int, unlink, (const char *path), (path))
WRAP(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size))
WRAP(int, close, (int fd), (fd))

int open(const char *path, int flags, ...) {
    static int (*real)(const char *, int, mode_t);
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    if (!real) real = (int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, "open");
    boundary();
    int result = real(path, flags, mode);
    boundary();
    return result;
}

int open64(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    return open(path, flags, mode);
}
