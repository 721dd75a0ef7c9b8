# What both guests share: how they start, print, take the timer's tick, and fill their memory.
#
# 32-bit protected mode without paging, started as a multiboot kernel (`-kernel`), so it needs no disk and
# runs on any PC board.  The numbers in capitals come from build.py by `as --defsym`; build.py computes the same
# contents in Python (Guest.page()), and a live test holds the two equal.

.intel_syntax noprefix
.code32

.equ PAGE, 4096
.equ DEBUGCON, 0xe9
.equ COM1, 0x3f8
.equ PIC1, 0x20
.equ PIC2, 0xa0
.equ PIT, 0x40
.equ LOCAL_APIC, 0xfee00000
.equ CODE_SELECTOR, 0x08
.equ DATA_SELECTOR, 0x10

.equ MULTIBOOT_MAGIC, 0x1badb002
.equ MULTIBOOT_ADDRESSES, 1 << 16        # the five addresses below are valid: this is no ELF file

.text
multiboot_header:
    .long MULTIBOOT_MAGIC
    .long MULTIBOOT_ADDRESSES
    .long -(MULTIBOOT_MAGIC + MULTIBOOT_ADDRESSES)
    .long multiboot_header, multiboot_header, load_end, bss_end, start

start:
    cli
    cld
    mov esp, offset stack_top
    lgdt [gdt_pointer]
    jmp CODE_SELECTOR:reload_segments
reload_segments:
    mov eax, DATA_SELECTOR
    mov ds, ax
    mov es, ax
    mov ss, ax
    call install_interrupts
    call start_serial
    call make_table
    call fill_memory
    mov esi, offset text_ready
    call print
    jmp main

# ---- interrupts: a trap ends the guest aloud, the timer's tick wakes it from hlt --------------------------

install_interrupts:
    mov edi, offset idt
    xor ecx, ecx
1:  mov eax, offset on_trap
    cmp ecx, 32
    jb 2f
    mov eax, offset on_tick
2:  mov word ptr [edi], ax
    mov word ptr [edi + 2], CODE_SELECTOR
    mov word ptr [edi + 4], 0x8e00       # present, 32-bit interrupt gate
    shr eax, 16
    mov word ptr [edi + 6], ax
    add edi, 8
    inc ecx
    cmp ecx, 48
    jb 1b
    lidt [idt_pointer]

    mov al, 0x11                         # both PICs: vectors 32..47, all masked except the timer
    out PIC1, al
    out PIC2, al
    mov al, 32
    out PIC1 + 1, al
    mov al, 40
    out PIC2 + 1, al
    mov al, 4
    out PIC1 + 1, al
    mov al, 2
    out PIC2 + 1, al
    mov al, 1
    out PIC1 + 1, al
    out PIC2 + 1, al
    mov al, 0xfe
    out PIC1 + 1, al
    mov al, 0xff
    out PIC2 + 1, al

    mov eax, [LOCAL_APIC + 0xf0]         # on, and the PICs' interrupts let through: not every firmware does it
    or eax, 0x1ff
    mov [LOCAL_APIC + 0xf0], eax
    mov dword ptr [LOCAL_APIC + 0x350], 0x700

    mov al, 0x34                         # channel 0, rate generator, 1193182 Hz / 1193 = 1000 Hz
    out PIT + 3, al
    mov al, 1193 & 0xff
    out PIT, al
    mov al, 1193 >> 8
    out PIT, al
    ret

on_tick:
    push eax
    mov al, 0x20
    out PIC1, al
    pop eax
    iret

on_trap:
    mov esi, offset text_trap
    call print
halt:
    cli
    hlt
    jmp halt

# Before QEMU 9.0 TCG forgets, after the dirty bitmap was read, to have the next store to a page make it dirty
# again, as long as the page is in its TLB: such a page stays behind when the guest migrates.  Changing CR4.PGE
# empties the TLB.  eax is lost.
wait_for_tick:
    mov eax, cr4
    xor eax, 1 << 7
    mov cr4, eax
    sti
    hlt                                  # nothing comes between the two: sti holds for one instruction
    cli
    ret

# ---- printing, on debugcon and COM1 -----------------------------------------------------------------------

start_serial:
    mov esi, offset serial_setup
    mov ecx, 7
1:  movzx edx, byte ptr [esi]
    add edx, COM1
    mov al, [esi + 1]
    out dx, al
    add esi, 2
    loop 1b
    ret

# al; all registers kept.  A COM1 that nobody empties is given up after a while, debugcon has it all.
print_character:
    push ecx
    push edx
    out DEBUGCON, al
    mov ah, al
    mov ecx, 10000
    mov edx, COM1 + 5
1:  in al, dx
    test al, 0x20                        # the transmitter is empty (or there is no COM1: all ones)
    jnz 2f
    loop 1b
2:  mov edx, COM1
    mov al, ah
    out dx, al
    pop edx
    pop ecx
    ret

# esi: text, ending with 0
print:
    lodsb
    test al, al
    jz 1f
    call print_character
    jmp print
1:  ret

# eax
print_decimal:
    mov ebx, 10
    xor ecx, ecx
1:  xor edx, edx
    div ebx
    push edx
    inc ecx
    test eax, eax
    jnz 1b
2:  pop eax
    add al, '0'
    call print_character
    loop 2b
    ret

# eax
print_hexadecimal:
    mov ebx, eax
    mov ecx, 8
1:  rol ebx, 4
    mov eax, ebx
    and eax, 15
    mov al, [hexadecimal_digits + eax]
    call print_character
    loop 1b
    ret

# ---- what memory holds ------------------------------------------------------------------------------------

# eax -> eax, thoroughly mixed (the last step of MurmurHash3); edx is lost
mix:
    mov edx, eax
    shr edx, 16
    xor eax, edx
    imul eax, eax, 0x85ebca6b
    mov edx, eax
    shr edx, 13
    xor eax, edx
    imul eax, eax, 0xc2b2ae35
    mov edx, eax
    shr edx, 16
    xor eax, edx
    ret

# ebx: page index -> eax: 0..255, which decides what the page is for; edx is lost
lot_of_page:
    mov eax, ebx
.if ALTERNATE
    and eax, 1
    neg al                               # even pages 0, odd ones 255
.else
    shr eax, LOT_SHIFT
    xor eax, SEED
    call mix
    shr eax, 24
.endif
    ret

# ebx: page index -> eax: what its contents are xored with; edx is lost
key_of_page:
    mov eax, ebx
    xor eax, SEED
    add eax, 0x9e3779b9
    jmp mix

# One page of xorshift32; each filled page is this, xored with its key.
make_table:
    mov edi, offset table
    mov ecx, PAGE / 4
    mov eax, SEED | 1
1:  mov edx, eax
    shl edx, 13
    xor eax, edx
    mov edx, eax
    shr edx, 17
    xor eax, edx
    mov edx, eax
    shl edx, 5
    xor eax, edx
    stosd
    loop 1b
    ret

# Pages whose lot is below ZERO_BELOW stay zero, all others get their contents.
fill_memory:
    xor ebx, ebx
    mov edi, FIRST_ADDRESS
1:  call lot_of_page
    cmp eax, ZERO_BELOW
    jae 2f
    xor eax, eax                         # RAM is zero when QEMU starts, but not after a reset
    mov ecx, PAGE / 4
    repe scasd
    je 4f
    call zero_page
    jmp 4f
2:  call key_of_page
    mov edx, eax
    mov esi, offset table
    mov ecx, PAGE / 4
3:  lodsd
    xor eax, edx
    stosd
    loop 3b
4:  inc ebx
    cmp ebx, FILL_COUNT
    jb 1b
    ret

# ebx: page index -> edi behind it
zero_page:
    mov edi, ebx
    shl edi, 12
    add edi, FIRST_ADDRESS
    xor eax, eax
    mov ecx, PAGE / 4
    rep stosd
    ret

# ---- data -------------------------------------------------------------------------------------------------

.data
.align 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff             # code, 4 GiB
    .quad 0x00cf92000000ffff             # data, 4 GiB
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
idt_pointer:
    .word 48 * 8 - 1
    .long idt
serial_setup:                            # register, value: 115200 baud, 8N1, FIFO on, no interrupts
    .byte 1, 0x00,  3, 0x80,  0, 0x01,  1, 0x00,  3, 0x03,  2, 0xc7,  4, 0x03
hexadecimal_digits:
    .ascii "0123456789abcdef"
text_ready:
    .asciz "ready\n"
text_trap:
    .asciz "\npass 0 bad trap\n"

.bss
.align 4096
table:
    .skip PAGE
idt:
    .skip 48 * 8
    .align 16
    .skip 4096
stack_top:
