/* SPDX-License-Identifier: Apache-2.0 */
/* The model file, byte for byte, in read-only memory; the runtime wants it aligned. */
	.section .rodata
	.balign 16
	.global model_begin, model_end
model_begin:
	.incbin MODEL
model_end:
	.section .note.GNU-stack, "", %progbits
