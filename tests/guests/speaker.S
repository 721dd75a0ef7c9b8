# A guest that says that it runs: a dot at each tick, then it writes to some pages, for ever.
#
# The first dot after a restore needs no more than the pages that it runs in.

.include "boot.S"

.text
main:
    xor ebx, ebx                         # ebx: page index
next_tick:
    call wait_for_tick
    mov al, '.'
    out DEBUGCON, al
    mov ecx, PAGES_PER_TICK
    jecxz next_tick
1:  mov edi, ebx
    shl edi, 12
    inc dword ptr [edi + FIRST_ADDRESS]
    add ebx, STRIDE
    cmp ebx, PAGE_COUNT
    jb 2f
    sub ebx, PAGE_COUNT
2:  loop 1b
    jmp next_tick

.data
load_end:
.bss
bss_end:
