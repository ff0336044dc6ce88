/* SPDX-License-Identifier: Apache-2.0 */
/* The model file in read-only memory, aligned as the runtime requires. */
	.section .rodata
	.balign 16
	.global model_begin, model_end
model_begin:
	.incbin MODEL
model_end:
	.section .note.GNU-stack, "", %progbits
