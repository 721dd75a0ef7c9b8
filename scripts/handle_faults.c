/* The peer of bench_pager: a guest that touches missing pages, and a handler of faults as one would write it in C.
 *
 *   handle_faults touch MEMFD LENGTH SOCKET COUNT INTERVAL_US
 *     Maps LENGTH bytes of MEMFD, registers them with a userfaultfd of its own, and prints the address and the
 *     descriptor.  After a line on standard input it touches COUNT pages, one each INTERVAL_US at the soonest, and
 *     prints how long each took in ns.  A second thread is the source: it places each page that is asked for on SOCKET.
 *
 *   handle_faults handle USERFAULTFD SOCKET ADDRESS
 *     Asks on SOCKET for each page that a thread waits for, by REQ_PAGES, until standard input ends.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, AT_ONCE = 64, REQ_PAGES = 4 };

struct request {
    uint16_t kind, length;
    uint64_t start;
    uint32_t bytes;
} __attribute__((packed));

static int faults, peer;
static unsigned char *memory, *contents;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void all(void *buffer, size_t length)
{
    for (size_t at = 0; at < length;) {
        ssize_t got = read(peer, (char *)buffer + at, length - at);
        if (got <= 0)
            exit(0);
        at += got;
    }
}

static void *source(void *unused)
{
    char name[256];
    for (;;) {
        struct request request;
        all(&request, sizeof request);
        if (ntohs(request.kind) != REQ_PAGES)
            all(name, ntohs(request.length) - 12);
        struct uffdio_copy copy = {
            .dst = (uintptr_t)memory + be64toh(request.start), .src = (uintptr_t)contents, .len = PAGE};
        if (ioctl(faults, UFFDIO_COPY, &copy))
            fail("UFFDIO_COPY");
    }
    return unused;
}

static int touch(char **argv)
{
    size_t length = atoll(argv[3]);
    int count = atoi(argv[5]);
    uint64_t interval_ns = atoll(argv[6]) * 1000ull;
    peer = atoi(argv[4]);
    faults = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    if (faults < 0 || ioctl(faults, UFFDIO_API, &api))
        fail("userfaultfd");
    memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[2]), 0);
    contents = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register area = {
        .range = {(uintptr_t)memory, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (memory == MAP_FAILED || ioctl(faults, UFFDIO_REGISTER, &area))
        fail("UFFDIO_REGISTER");
    memset(contents, 1, PAGE);
    printf("%llu %d\n", (unsigned long long)(uintptr_t)memory, faults);
    fflush(stdout);
    if (getchar() == EOF)
        return 1;
    pthread_t thread;
    pthread_create(&thread, NULL, source, NULL);
    volatile unsigned char *pages = memory;
    for (int i = 0; i < count; i++) {
        struct timespec pause = {0, interval_ns};
        nanosleep(&pause, NULL);
        uint64_t began = now_ns();
        (void)pages[(size_t)i * PAGE];
        printf("%llu\n", (unsigned long long)(now_ns() - began));
    }
    return 0;
}

static int handle(char **argv)
{
    uint64_t address = strtoull(argv[4], NULL, 10);
    faults = atoi(argv[2]);
    peer = atoi(argv[3]);
    struct pollfd waits[] = {{faults, POLLIN, 0}, {0, POLLIN, 0}};
    while (poll(waits, 2, -1) > 0 && !waits[1].revents) {
        struct uffd_msg messages[AT_ONCE];
        ssize_t got = read(faults, messages, sizeof messages);
        for (int i = 0; i < got / (ssize_t)sizeof *messages; i++) {
            uint64_t start = (messages[i].arg.pagefault.address - address) & ~(uint64_t)(PAGE - 1);
            struct request request = {htons(REQ_PAGES), htons(12), htobe64(start), htonl(PAGE)};
            if (write(peer, &request, sizeof request) != sizeof request)
                return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 7 && !strcmp(argv[1], "touch"))
        return touch(argv);
    if (argc == 5 && !strcmp(argv[1], "handle"))
        return handle(argv);
    return 2;
}
