/* The peer of bench_streams: a plain scanner of a migration stream's pages, as one would write it in C.
 *
 * Reads the file in pieces of 1 MiB, follows the records of the ram section, and keeps for each page where its
 * contents are.  Knows no more than it must: 4 KiB pages, no xbzrle, no package.  With a directory as second
 * argument it also writes each normal page into one file there, by pwrite.
 *
 * Prints: pages and the sum of their places, CPU seconds (user, system).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { WINDOW = 1 << 20, PAGE = 4096, BLOCKS = 64 };

static unsigned char window[WINDOW];
static size_t at, have;
static uint64_t consumed;
static int input;

static int more(size_t count)
{
    if (have - at >= count)
        return 1;
    memmove(window, window + at, have - at);
    have -= at;
    at = 0;
    while (have < count) {
        ssize_t got = read(input, window + have, WINDOW - have);
        if (got <= 0)
            return 0;
        have += got;
    }
    return 1;
}

static void skip(size_t count)
{
    at += count;
    consumed += count;
}

static uint32_t get32(const unsigned char *p)
{
    return (uint32_t)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3];
}

static uint64_t get64(const unsigned char *p)
{
    return (uint64_t)get32(p) << 32 | get32(p + 4);
}

static void need(size_t count)
{
    if (!more(count)) {
        fprintf(stderr, "scan_pages: the stream ends at %llu\n", (unsigned long long)(consumed + have - at));
        exit(1);
    }
}

struct block { char name[256]; uint64_t length; uint64_t *index; int file; };
static struct block blocks[BLOCKS];
static int block_count;
static struct block *block;
static uint64_t page_count;

static void name(void)
{
    need(1);
    size_t length = window[at];
    need(1 + length);
    for (int i = 0; i < block_count; i++)
        if (strlen(blocks[i].name) == length && !memcmp(blocks[i].name, window + at + 1, length))
            block = &blocks[i];
    skip(1 + length);
}

static void records(const char *directory)
{
    for (;;) {
        need(8);
        uint64_t word = get64(window + at), start = word & ~(uint64_t)(PAGE - 1);
        unsigned flags = word & (PAGE - 1);
        skip(8);
        if (flags == 0x10)
            return;
        if (flags == 0x200)
            continue;
        if (!(flags & 0x20))
            name();
        if (!block || start >= block->length)
            exit(1);
        if ((flags & ~0x20u) == 0x08) {
            need(PAGE);
            block->index[start / PAGE] = consumed;
            if (directory && pwrite(block->file, window + at, PAGE, start) != PAGE)
                exit(1);
            skip(PAGE);
        } else {
            need(1);
            block->index[start / PAGE] = 1;
            skip(1);
        }
        page_count++;
    }
}

int main(int argc, char **argv)
{
    const char *directory = argc > 2 ? argv[2] : NULL;
    input = open(argv[1], O_RDONLY);
    if (argc < 2 || input < 0)
        return 2;
    need(13);
    uint32_t length = get32(window + 9);
    skip(13);
    need(length);
    skip(length);
    for (;;) {
        need(1);
        unsigned kind = window[at];
        if (kind == 0x01) {
            need(6);
            size_t header = 6 + window[at + 5] + 8;
            need(header);
            skip(header);
            need(8);
            uint64_t total = get64(window + at) & ~(uint64_t)(PAGE - 1);
            skip(8);
            while (total) {
                struct block *b = &blocks[block_count++];
                need(1);
                size_t n = window[at];
                need(1 + n + 8);
                memcpy(b->name, window + at + 1, n);
                b->length = get64(window + at + 1 + n);
                b->index = calloc(b->length / PAGE, sizeof *b->index);
                if (directory) {
                    char path[4096];
                    snprintf(path, sizeof path, "%s/%d.raw", directory, block_count);
                    b->file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
                    if (ftruncate(b->file, b->length))
                        return 1;
                }
                skip(1 + n + 8);
                total -= b->length;
            }
            records(directory);
        } else if (kind == 0x02 || kind == 0x03) {
            need(5);
            skip(5);
            records(directory);
            if (kind == 0x03)
                break;
        } else if (kind == 0x7e) {
            need(5);
            skip(5);
        } else if (kind == 0x08) {
            need(5);
            size_t payload = window[at + 3] << 8 | window[at + 4];
            need(5 + payload);
            skip(5 + payload);
        } else {
            return 1;
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    uint64_t sum = 0;
    for (int i = 0; i < block_count; i++)
        for (uint64_t page = 0; page < blocks[i].length / PAGE; page++)
            sum += blocks[i].index[page];
    printf("%llu:%llx %ld.%06ld %ld.%06ld\n", (unsigned long long)page_count, (unsigned long long)sum,
           used.ru_utime.tv_sec, used.ru_utime.tv_usec, used.ru_stime.tv_sec, used.ru_stime.tv_usec);
    return 0;
}
