/* Preloaded into the processes under test: stands before the C library's file calls, so that it sees every write,
 * fsync, rename and unlink, whether Python, Rust or C++ makes it. It does nothing until chaos_arm() was called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OP_WRITE = 1, OP_FSYNC = 2, OP_RENAME = 4, OP_UNLINK = 8 };
enum { ACT_COUNT = 0, ACT_STRIKE = 1, ACT_FAIL = 2, ACT_DELAY = 3, ACT_TRACE = 4 };

static int arm_ops, arm_action;
static long arm_value;
static char arm_root[1024], arm_part[256];
static atomic_long seen, skip;
static atomic_int struck;
static _Thread_local const char *renamed; /* the old name, while a rename is met */

static char strike_journal[1024], strike_text[256], strike_pids[4096];
static int strike_signal;

void chaos_arm(int ops, const char *root, const char *part, long skip_first, int action, long value) {
    arm_ops = 0;
    snprintf(arm_root, sizeof arm_root, "%s", root);
    snprintf(arm_part, sizeof arm_part, "%s", part);
    atomic_store(&seen, 0);
    atomic_store(&skip, skip_first);
    arm_action = action;
    arm_value = value;
    arm_ops = ops;
}

long chaos_seen(void) { return atomic_load(&seen); }

void chaos_prepare(const char *journal, const char *text, int number, const char *pid_files) {
    snprintf(strike_journal, sizeof strike_journal, "%s", journal);
    snprintf(strike_text, sizeof strike_text, "%s", text);
    snprintf(strike_pids, sizeof strike_pids, "%s", pid_files);
    strike_signal = number;
}

static void append(const char *text) {
    int out = (int)syscall(SYS_openat, AT_FDCWD, strike_journal, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (out >= 0) {
        syscall(SYS_write, out, text, strlen(text));
        syscall(SYS_close, out);
    }
}

/* Note the strike, then send the signal: to the processes whose pid files are named, else to this one. Only once. */
void chaos_strike(const char *phase) {
    int none = 0;
    if (!atomic_compare_exchange_strong(&struck, &none, 1)) return;
    char line[600];
    snprintf(line, sizeof line, "%s %s %d\n", strike_text, phase, (int)getpid());
    append(line);
    if (!strike_pids[0]) {
        kill(getpid(), strike_signal);
        return;
    }
    char names[4096], *rest = names, *name;
    snprintf(names, sizeof names, "%s", strike_pids);
    int self = 0;
    while ((name = strsep(&rest, ":")) != NULL) {
        char digits[32] = {0};
        int in = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDONLY);
        if (in < 0) continue;
        syscall(SYS_read, in, digits, sizeof digits - 1);
        syscall(SYS_close, in);
        int pid = atoi(digits);
        if (pid == getpid()) self = 1;
        else if (pid > 1) kill(pid, strike_signal);
    }
    if (self) kill(getpid(), strike_signal);
}

int chaos_struck(void) { return atomic_load(&struck); }

static int matches(int op, const char *path) {
    if (!(arm_ops & op)) return 0;
    return strncmp(path, arm_root, strlen(arm_root)) == 0 && strstr(path + strlen(arm_root), arm_part) != NULL;
}

/* 0 = go on; -1 = fail with errno set; 1 = this is the call to strike at. */
static int meet(int op, const char *path) {
    if (!matches(op, path)) return 0;
    long number = atomic_fetch_add(&seen, 1);
    if (arm_action == ACT_COUNT) return 0;
    if (arm_action == ACT_TRACE) {
        char line[8400];
        snprintf(line, sizeof line, "%d\t%s\t%s\n", op, path, op == OP_RENAME && renamed ? renamed : "");
        append(line);
        return 0;
    }
    if (arm_action == ACT_DELAY) {
        struct timespec wait = {arm_value / 1000000, (arm_value % 1000000) * 1000};
        nanosleep(&wait, NULL);
        return 0;
    }
    if (number < atomic_load(&skip)) return 0;
    if (arm_action == ACT_FAIL) {
        errno = (int)arm_value;
        return -1;
    }
    return number == atomic_load(&skip);
}

static int meet_fd(int op, int fd, char *path, size_t size) {
    path[0] = 0;
    if (!(arm_ops & op)) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return meet(op, path);
}

static void full_path(int folder, const char *name, char *path, size_t size) {
    path[0] = 0;
    if (name[0] == '/') {
        snprintf(path, size, "%s", name);
        return;
    }
    char link[64], base[2048];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    if (length < 0) return;
    base[length] = 0;
    snprintf(path, size, "%s/%s", base, name);
}

static void strike_at(const char *path) {
    const char *name = strrchr(path, '/');
    chaos_strike(name ? name + 1 : path);
}

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* A strike at a write leaves half of it behind. */
#define WRITES(call_half, call) \
    char path[4096]; \
    int met = meet_fd(OP_WRITE, fd, path, sizeof path); \
    if (met < 0) return -1; \
    if (met) { call_half; strike_at(path); } \
    return call

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    WRITES(if (size > 1) { ssize_t half = next(fd, data, size / 2); if (half > 0) { data = (const char *)data + half; size -= (size_t)half; strike_at(path); ssize_t more = next(fd, data, size); return more < 0 ? half : half + more; } }, next(fd, data, size));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    NEXT(pwrite);
    WRITES(if (size > 1) next(fd, data, size / 2, at), next(fd, data, size, at));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    NEXT(pwrite64);
    WRITES(if (size > 1) next(fd, data, size / 2, at), next(fd, data, size, at));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    NEXT(writev);
    WRITES((void)0, next(fd, parts, count));
}

#define SYNCS(call) \
    char path[4096]; \
    int met = meet_fd(OP_FSYNC, fd, path, sizeof path); \
    if (met < 0) return -1; \
    if (met) strike_at(path); \
    return call

int fsync(int fd) { NEXT(fsync); SYNCS(next(fd)); }
int fdatasync(int fd) { NEXT(fdatasync); SYNCS(next(fd)); }

#define NAMES(op, folder, name, call) \
    char path[4096]; \
    if (arm_ops & (op)) full_path(folder, name, path, sizeof path); \
    else path[0] = 0; \
    int met = meet(op, path); \
    if (met < 0) return -1; \
    if (met) strike_at(path); \
    return call

int rename(const char *from, const char *to) {
    NEXT(rename);
    renamed = from;
    NAMES(OP_RENAME, AT_FDCWD, to, next(from, to));
}
int renameat(int ff, const char *from, int tf, const char *to) {
    NEXT(renameat);
    renamed = from;
    NAMES(OP_RENAME, tf, to, next(ff, from, tf, to));
}
int unlink(const char *name) { NEXT(unlink); NAMES(OP_UNLINK, AT_FDCWD, name, next(name)); }
int unlinkat(int folder, const char *name, int flags) {
    NEXT(unlinkat);
    NAMES(OP_UNLINK, folder, name, next(folder, name, flags));
}
int rmdir(const char *name) { NEXT(rmdir); NAMES(OP_UNLINK, AT_FDCWD, name, next(name)); }

/* Processes that are not forked from a server that arms them are armed by their environment:
 * CHAOS_ARM = ops|root|part|skip|action|value, and for a strike CHAOS_STRIKE = journal|text|signal. */
__attribute__((constructor)) static void arm_by_environment(void) {
    const char *given = getenv("CHAOS_ARM");
    char root[1024], part[256], journal[1024], text[256];
    int ops, action, number;
    long skip_first, value;
    if (!given) return;
    const char *strike = getenv("CHAOS_STRIKE");
    if (strike && sscanf(strike, "%1023[^|]|%255[^|]|%d", journal, text, &number) == 3)
        chaos_prepare(journal, text, number, "");
    if (sscanf(given, "%d|%1023[^|]|%255[^|]|%ld|%d|%ld", &ops, root, part, &skip_first, &action, &value) == 6)
        chaos_arm(ops, root, part, skip_first, action, value);
}
