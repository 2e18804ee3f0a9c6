/*
 * Preloaded into the relay: its disk may fail and its wall clock may be set, as the file behind CHAOS_CONTROL says.
 *
 * Only files below the directory in CHAOS_DISK fail. Nothing else of the process changes, and with an empty control
 * file nothing at all. The layout of the control file is that of Control in syscalls.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    volatile int64_t clock_offset;  /* Nanoseconds, added to the wall clock. */
    volatile int32_t write_error;   /* Writes, and what makes a file longer, fail with this errno. */
    volatile int32_t sync_error;    /* fsync and fdatasync fail with this errno. */
    volatile int32_t hold_sync;     /* fsync and fdatasync of a "-wal" do not return while this is set. */
    volatile int32_t held;          /* Set once one of them is held. */
    volatile int32_t failed;        /* How many calls have failed. */
};

static struct control none, *control = &none;
static const char *disk;

#define REAL(result, name, ...) \
    static result (*real_##name)(__VA_ARGS__); \
    if (!real_##name) real_##name = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("CHAOS_CONTROL");
    int descriptor = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    disk = getenv("CHAOS_DISK");
    if (descriptor < 0 || !disk)
        return;
    void *mapped = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED)
        control = mapped;
    close(descriptor);
}

static int on_disk(int descriptor, const char *suffix)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    size_t ending = strlen(suffix);
    return !strncmp(path, disk, strlen(disk)) && (size_t)length >= ending && !strcmp(path + length - ending, suffix);
}

static int fails(int error, int descriptor)
{
    if (!error || !on_disk(descriptor, ""))
        return 0;
    __sync_fetch_and_add(&control->failed, 1);
    errno = error;
    return 1;
}

ssize_t write(int descriptor, const void *bytes, size_t size)
{
    REAL(ssize_t, write, int, const void *, size_t);
    return fails(control->write_error, descriptor) ? -1 : real_write(descriptor, bytes, size);
}

ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t at)
{
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    return fails(control->write_error, descriptor) ? -1 : real_pwrite(descriptor, bytes, size, at);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at)
{
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return fails(control->write_error, descriptor) ? -1 : real_pwrite64(descriptor, bytes, size, at);
}

int posix_fallocate(int descriptor, off_t at, off_t size)
{
    REAL(int, posix_fallocate, int, off_t, off_t);
    return fails(control->write_error, descriptor) ? control->write_error : real_posix_fallocate(descriptor, at, size);
}

int posix_fallocate64(int descriptor, off64_t at, off64_t size)
{
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    return fails(control->write_error, descriptor) ? control->write_error
                                                   : real_posix_fallocate64(descriptor, at, size);
}

static int sync_fails(int descriptor)
{
    while (control->hold_sync && on_disk(descriptor, "-wal")) {
        control->held = 1;
        usleep(1000);
    }
    return fails(control->sync_error, descriptor);
}

int fsync(int descriptor)
{
    REAL(int, fsync, int);
    return sync_fails(descriptor) ? -1 : real_fsync(descriptor);
}

int fdatasync(int descriptor)
{
    REAL(int, fdatasync, int);
    return sync_fails(descriptor) ? -1 : real_fdatasync(descriptor);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real_clock_gettime(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t offset = control->clock_offset + now->tv_nsec;
        now->tv_sec += offset / 1000000000;
        now->tv_nsec = offset % 1000000000;
        if (now->tv_nsec < 0) {
            now->tv_nsec += 1000000000;
            now->tv_sec -= 1;
        }
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    REAL(int, gettimeofday, struct timeval *restrict, void *restrict);
    int result = real_gettimeofday(now, zone);
    if (!result)
        now->tv_sec += control->clock_offset / 1000000000;
    return result;
}

time_t time(time_t *now)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now)
        *now = precise.tv_sec;
    return precise.tv_sec;
}
