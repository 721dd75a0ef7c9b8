# A guest that fills its memory with known contents, says `ready`, and never touches anything again.

.include "boot.S"

.text
.equ main, halt

.data
load_end:
.bss
bss_end:
