// kvlocal: chat templates, and the parsers of what models answer, over llama.cpp's common/.
//
// The C API of libkvlocal-chat and, between the two cffi marks, the cdef that the Python side reads.
//
// A template comes with a model, from anywhere: each call below runs it on a thread of its own, with limits on time, memory and depth. What goes
// beyond them ends with KVL_CHAT_ERR_LIMIT and leaves nothing behind but, at worst, a thread that still has to notice.
//
// Strings are UTF-8, given by their length. Requests and results are JSON objects. Every call returns 0, or a kvl_chat_status below zero and a
// message for kvl_chat_last_error(). Calls may run at the same time, also with the same template.

#ifndef KVLOCAL_CHAT_H
#define KVLOCAL_CHAT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

/* cffi: begin */

enum {
    KVL_CHAT_API_VERSION = 2
};

enum kvl_chat_status {
    KVL_CHAT_OK           =  0,
    KVL_CHAT_ERR_ARGUMENT = -1, // a null pointer, a request that is not what the call takes, a limit that is not positive
    KVL_CHAT_ERR_TEMPLATE = -2, // the template is broken, or refuses the conversation
    KVL_CHAT_ERR_LIMIT    = -3, // it takes too much time or memory, or is nested too deeply
    KVL_CHAT_ERR_PARSE    = -4, // the answer is not in the template's format
    KVL_CHAT_ERR_INTERNAL = -5  // no memory or no thread
};

// a compiled template
struct kvl_chat;

// how a model answers in a conversation with certain tools: what kvl_chat_apply finds out and kvl_chat_parse needs
struct kvl_chat_format;

// the result of a call
struct kvl_chat_text;

// the version of this interface, to be compared with KVL_CHAT_API_VERSION
int32_t kvl_chat_api_version(void);

// why the last call on this thread failed, "" if it did not
const char * kvl_chat_last_error(void);

// compiles a template; bos and eos are the texts of these tokens
// seconds: how long each call with it may take; n_bytes: how much memory, besides 64 times the size of its request
int32_t kvl_chat_compile(
        const char * source, size_t n_source, const char * bos, size_t n_bos, const char * eos, size_t n_eos,
        double seconds, int64_t n_bytes, struct kvl_chat ** chat);

// the text of a conversation, as it is
// request: {"messages": [{"role", "content", ...}], "add_generation_prompt": bool, "now": seconds since 1970} and, if need be, "tools" and
//     "enable_thinking": bool, which templates read that can have the model answer without a thought
int32_t kvl_chat_render(const struct kvl_chat * chat, const char * request, size_t n_request, struct kvl_chat_text ** text);

// the text of a conversation with llama.cpp's adjustments for the model family, and the format of the answer to it
// request: {"messages": as in OpenAI's chat completions, with "reasoning_content" and "tool_calls", "add_generation_prompt": bool} and, if need
//     be, "tools", "tool_choice" ("auto", "required", "none") and "parallel_tool_calls" as there, "json_schema", "enable_thinking" as above,
//     and "now" in seconds since 1970
// result: {"prompt", "generation_prompt", "supports_thinking", "thinking_start", "thinking_ends": [], "stops": [], "preserved_tokens": [],
//     "delimiters": [{"role", "delimiter"}], "grammar", "grammar_lazy", "grammar_triggers": [{"type", "value"}]}
int32_t kvl_chat_apply(
        const struct kvl_chat * chat, const char * request, size_t n_request, struct kvl_chat_format ** format, struct kvl_chat_text ** text);

// what an answer says; text: without the generation prompt, with the texts of control tokens
// is_partial: whether it still goes on
// result: {"content", "reasoning_content", "tool_calls": [{"name", "arguments", "id"}]}
int32_t kvl_chat_parse(
        const struct kvl_chat_format * format, const char * answer, size_t n_answer, int32_t is_partial, struct kvl_chat_text ** text);

// the bytes of a result, not terminated
const char * kvl_chat_text_data(const struct kvl_chat_text * text);
size_t       kvl_chat_text_size(const struct kvl_chat_text * text);

// all of these take NULL
void kvl_chat_free       (struct kvl_chat * chat);
void kvl_chat_format_free(struct kvl_chat_format * format);
void kvl_chat_text_free  (struct kvl_chat_text * text);

/* cffi: end */

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif // KVLOCAL_CHAT_H
