// Runs code that follows someone else's template or text, on a thread of its own and within limits.

#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

struct kvl_chat_error : std::runtime_error {
    int32_t status;

    kvl_chat_error(int32_t status, const std::string & message) : std::runtime_error(message), status(status) {}
};

struct kvl_limits {
    double  seconds;
    int64_t n_bytes; // live memory
};

// calls f and returns 0, or a kvl_chat_status and a message
// f may still run when this has returned with KVL_CHAT_ERR_LIMIT: it must own what it touches
int32_t kvl_run_limited(const kvl_limits & limits, int32_t status_of_exceptions, std::function<void()> f, std::string & message);

// stops the thread of a limited call here if it is beyond a limit; llama.cpp's Jinja engine calls it wherever it recurses
void kvl_check_limits();
