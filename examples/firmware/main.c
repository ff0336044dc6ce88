/* SPDX-License-Identifier: Apache-2.0 */
/* A minimal firmware: it embeds the model and checks the file's magic number. A real one passes it to an interpreter. */
#include <stdio.h>
#include <string.h>

extern const unsigned char model_begin[], model_end[];

int main(void) {
    const unsigned long bytes = (unsigned long)(model_end - model_begin);
    const int is_tflite = bytes > 8 && memcmp(model_begin + 4, "TFL3", 4) == 0;
    printf("model: %lu bytes, %s\n", bytes, is_tflite ? "TFLite" : "not TFLite");
    return is_tflite ? 0 : 1;
}
