# A guest that writes its memory for ever, in an order that it can check.
#
# In pass N it visits every page of its range.  A walked page must hold in three words, the first, the middle
# and the last, what pass N-1 wrote; then it gets the words of pass N.  The other pages must hold what they were
# filled with.  After each pass the guest says what it found:
#
#     pass 12 good
#     pass 13 bad since=13 page=345 found=00000000,00000000,00000000 expected=9d2c5680,9d2c5680,9d2c5680
#
# The first fault is repeated for ever.  Words that differ from each other: a torn page; those of an older pass: a
# stale one; zero: a lost one.

.include "boot.S"

.equ FIRST_WORD, 0
.equ MIDDLE_WORD, PAGE / 2
.equ LAST_WORD, PAGE - 4
.equ PAGE_FACTOR, 0x9e3779b1             # both odd: no two pages, and no two passes, write the same
.equ PASS_FACTOR, 0x85ebca6b

.text
main:
    mov dword ptr [pass], 0              # pass 0 looks at nothing and writes only
next_pass:
    xor ebx, ebx                         # ebx: page index, ebp: pages to go
    mov ebp, PAGE_COUNT
next_page:
    mov edi, ebx                         # edi: its address
    shl edi, 12
    add edi, FIRST_ADDRESS
    call lot_of_page
    cmp eax, WALKED_FROM
    jae walked
    cmp dword ptr [pass], 0
    je page_done
    cmp eax, ZERO_BELOW
    jae filled
    xor eax, eax
    call expect_everywhere
    jmp check

filled:
    call key_of_page
    mov ecx, [table + FIRST_WORD]
    xor ecx, eax
    mov [expected], ecx
    mov ecx, [table + MIDDLE_WORD]
    xor ecx, eax
    mov [expected + 4], ecx
    mov ecx, [table + LAST_WORD]
    xor ecx, eax
    mov [expected + 8], ecx
check:
    call check_page
    jmp page_done

walked:
    cmp dword ptr [pass], 0
    je 1f
    mov eax, [pass]
    dec eax
    call words_of_pass
    call expect_everywhere
    call check_page
1:  mov eax, [pass]
    call words_of_pass
    mov [edi + FIRST_WORD], eax
    mov [edi + MIDDLE_WORD], eax
    mov [edi + LAST_WORD], eax

page_done:
.if PAGES_PER_TICK
    dec dword ptr [until_tick]
    jnz 1f
    mov dword ptr [until_tick], PAGES_PER_TICK
    call wait_for_tick
1:
.endif
    add ebx, STRIDE                      # no common factor with PAGE_COUNT: all pages, each once
    cmp ebx, PAGE_COUNT
    jb 1f
    sub ebx, PAGE_COUNT
1:  dec ebp
    jnz next_page

    cmp dword ptr [pass], 0
    je 1f
    call print_verdict
1:  inc dword ptr [pass]
    jmp next_pass

# eax: pass, ebx: page index -> eax
words_of_pass:
    imul eax, eax, PASS_FACTOR
    imul ecx, ebx, PAGE_FACTOR
    xor eax, ecx
    ret

# eax
expect_everywhere:
    mov [expected], eax
    mov [expected + 4], eax
    mov [expected + 8], eax
    ret

# edi: page; the first fault ever found is kept
check_page:
    mov eax, [edi + FIRST_WORD]
    mov ecx, [edi + MIDDLE_WORD]
    mov edx, [edi + LAST_WORD]
    cmp eax, [expected]
    jne 1f
    cmp ecx, [expected + 4]
    jne 1f
    cmp edx, [expected + 8]
    jne 1f
    ret
1:  cmp dword ptr [bad_since], 0
    jne 2f
    mov [bad_found], eax
    mov [bad_found + 4], ecx
    mov [bad_found + 8], edx
    mov [bad_page], ebx
    mov eax, [expected]
    mov [bad_expected], eax
    mov eax, [expected + 4]
    mov [bad_expected + 4], eax
    mov eax, [expected + 8]
    mov [bad_expected + 8], eax
    mov eax, [pass]
    mov [bad_since], eax
2:  ret

print_verdict:
    mov esi, offset text_pass
    call print
    mov eax, [pass]
    call print_decimal
    mov esi, offset text_good
    cmp dword ptr [bad_since], 0
    je print                             # and return from there
    mov esi, offset text_bad
    call print
    mov eax, [bad_since]
    call print_decimal
    mov esi, offset text_page
    call print
    mov eax, [bad_page]
    call print_decimal
    mov esi, offset text_found
    mov edi, offset bad_found
    call print_words
    mov esi, offset text_expected
    mov edi, offset bad_expected
    call print_words
    mov al, '\n'
    jmp print_character

# esi: text, edi: three words
print_words:
    mov ebp, 3
1:  call print
    mov eax, [edi]
    call print_hexadecimal
    add edi, 4
    mov esi, offset text_comma
    dec ebp
    jnz 1b
    ret

.data
.align 4
pass:         .long 0
until_tick:   .long PAGES_PER_TICK
bad_since:    .long 0
bad_page:     .long 0
bad_found:    .long 0, 0, 0
bad_expected: .long 0, 0, 0
expected:     .long 0, 0, 0
text_pass:     .asciz "pass "
text_good:     .asciz " good\n"
text_bad:      .asciz " bad since="
text_page:     .asciz " page="
text_found:    .asciz " found="
text_expected: .asciz " expected="
text_comma:    .asciz ","
load_end:
.bss
bss_end:
