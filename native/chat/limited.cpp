// A recursive interpreter has three ways to take a process down: it runs for ever, it takes all memory, it overflows the stack. It is stopped where
// it allocates: operator new, which this library has for itself, counts the bytes of the thread and looks at the clock and at the stack. The engine
// does the latter, too, where it recurses. Destructors can't be stopped, and recurse as deeply as what they destroy is nested; a level takes more
// memory than stack, so a stack that is some times the memory there may be is deep enough for them.

#include "limited.h"

#include "kvlocal-chat.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#if defined(__APPLE__)
#    include <malloc/malloc.h>
#    define allocated_size malloc_size
#else
#    include <malloc.h>
#    define allocated_size malloc_usable_size
#endif

#if defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define KVL_ADDRESS_SANITIZER
#    endif
#elif defined(__SANITIZE_ADDRESS__)
#    define KVL_ADDRESS_SANITIZER
#endif

using steady = std::chrono::steady_clock;

namespace {

enum class limit { none, time, memory, depth };

// plain data: it is there before the first allocation of a thread, and after the last
struct watch {
    bool               on;
    limit              exceeded;
    int64_t            n_bytes;
    int64_t            n_bytes_max;
    uint32_t           n_calls;
    steady::rep        deadline;
    const char *       stack_start;
};

thread_local watch t_watch;

struct limit_exceeded : std::bad_alloc {
    const char * what() const noexcept override { return "a limit was exceeded"; }
};

constexpr size_t STACK_PER_BYTE  = 4;       // of memory; for destructors
constexpr size_t STACK_MAX       = 4 << 20; // for everything else
constexpr int    CALLS_PER_CLOCK = 64;

void stop(limit which) {
    t_watch.exceeded = which;
    throw limit_exceeded();
}

void look(size_t n) {
    if (t_watch.exceeded != limit::none) {
        // what was thrown may have been caught on the way
        throw limit_exceeded();
    }
    if (t_watch.n_bytes + (int64_t) n > t_watch.n_bytes_max || (int64_t) n < 0) {
        stop(limit::memory);
    }
    const char here = 0;
    if (t_watch.stack_start - &here > (ptrdiff_t) STACK_MAX) {
        stop(limit::depth);
    }
    if (++t_watch.n_calls % CALLS_PER_CLOCK == 0 && steady::now().time_since_epoch().count() > t_watch.deadline) {
        stop(limit::time);
    }
}

struct job {
    kvl_limits            limits;
    int32_t               status_of_exceptions;
    std::function<void()> f;
    steady::time_point    deadline;

    std::mutex              mutex;
    std::condition_variable done_or_late;
    bool                    done = false;
    int32_t                 status = KVL_CHAT_OK;
    std::string             message;

    std::string sentence(limit which) const {
        char text[80];
        switch (which) {
            case limit::time:
                snprintf(text, sizeof(text), "it takes more than %g seconds", limits.seconds);
                return text;
            case limit::memory:
                snprintf(text, sizeof(text), "it takes more than %.0f MB of memory", limits.n_bytes/1e6);
                return text;
            default:
                return "it is nested too deeply";
        }
    }

    void run() {
        try {
            f();
        } catch (const limit_exceeded &) {
        } catch (const kvl_chat_error & e) {
            status  = e.status;
            message = e.what();
        } catch (const std::bad_alloc &) {
            status  = KVL_CHAT_ERR_INTERNAL;
            message = "out of memory";
        } catch (const std::exception & e) {
            status  = status_of_exceptions;
            message = e.what();
        } catch (...) {
            status  = KVL_CHAT_ERR_INTERNAL;
            message = "unknown exception";
        }
    }

    void run_watched() {
        const char here = 0;
        t_watch = { true, limit::none, 0, limits.n_bytes, 0, deadline.time_since_epoch().count(), &here };
        try {
            run();
        } catch (const std::bad_alloc &) {
            // the message did not fit either
        }
        t_watch.on = false;
        f = nullptr;
        if (t_watch.exceeded != limit::none) {
            status  = KVL_CHAT_ERR_LIMIT;
            message = sentence(t_watch.exceeded);
        }
    }
};

void * run_job(void * argument) {
    std::unique_ptr<std::shared_ptr<job>> owned(static_cast<std::shared_ptr<job> *>(argument));
    job & j = **owned;

    j.run_watched();

    std::lock_guard<std::mutex> lock(j.mutex);
    j.done = true;
    j.done_or_late.notify_all();

    return nullptr;
}

} // namespace

#ifndef KVL_ADDRESS_SANITIZER // which has to see its own

void * operator new(size_t n) {
    if (t_watch.on) {
        look(n);
    }
    void * p = malloc(n ? n : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    if (t_watch.on) {
        t_watch.n_bytes += allocated_size(p);
    }
    return p;
}

void operator delete(void * p) noexcept {
    if (t_watch.on && p) {
        t_watch.n_bytes -= allocated_size(p);
    }
    free(p);
}

void operator delete(void * p, size_t) noexcept {
    operator delete(p);
}

#endif

void kvl_check_limits() {
    if (t_watch.on) {
        look(0);
    }
}

int32_t kvl_run_limited(const kvl_limits & limits, int32_t status_of_exceptions, std::function<void()> f, std::string & message) {
    auto j = std::make_shared<job>();

    j->limits               = limits;
    j->status_of_exceptions = status_of_exceptions;
    j->f                    = std::move(f);
    j->deadline             = steady::now() + std::chrono::duration_cast<steady::duration>(std::chrono::duration<double>(limits.seconds));

    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_MAX + STACK_PER_BYTE*(size_t) limits.n_bytes); // address space; only what is used becomes memory

    auto owned = std::make_unique<std::shared_ptr<job>>(j);

    pthread_t thread;
    const int failure = pthread_create(&thread, &attributes, run_job, owned.get());
    pthread_attr_destroy(&attributes);
    if (failure) {
        message = "the system gives no thread for it";
        return KVL_CHAT_ERR_INTERNAL;
    }
    owned.release();

    std::unique_lock<std::mutex> lock(j->mutex);
    // long enough for what stops by itself; loops without any allocation are left to themselves
    if (!j->done_or_late.wait_until(lock, j->deadline + std::chrono::seconds(1), [&] { return j->done; })) {
        message = j->sentence(limit::time);
        return KVL_CHAT_ERR_LIMIT;
    }
    message = std::move(j->message);
    return j->status;
}
