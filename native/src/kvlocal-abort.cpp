// What is said when ggml gives up: a device that is lost ends the process, there is no way back from it.

#include "kvlocal.h"

#include "ggml.h"

#include <cstdio>
#include <cstring>

// message: "file:line: why"
static void say(const char * message) {
    const char * why = strstr(message, ": ");

    fprintf(stderr, "kvlocal: llama.cpp had to stop (%s); what was said is kept: start again, with --gpu-layers 0 if a device keeps failing\n",
            why ? why + 2 : message);
    fflush(stderr);
}

void kvl_abort_in_a_sentence(void) {
    ggml_set_abort_callback(say);
}
