// The C boundary of libkvlocal-chat: arguments are checked here, and every exception becomes a return code and a message.

#include "kvlocal-chat.h"

#include "limited.h"

#include "chat.h"
#include "log.h"

#include <chrono>
#include <ctime>
#include <memory>
#include <mutex>

using json = common_json;

// requests may be long texts, of which the engine makes many copies
static constexpr int64_t COPIES    = 64;
static constexpr int64_t MAX_BYTES = int64_t(1) << 30;

struct compiled {
    common_chat_templates_ptr             families; // with the parsers
    std::unique_ptr<common_chat_template> plain;    // as it is
};

struct kvl_chat {
    std::shared_ptr<const compiled> templates;
    kvl_limits                      limits;
};

struct kvl_chat_format {
    std::shared_ptr<const common_chat_parser_params> parser;
    kvl_limits                                       limits;
};

struct kvl_chat_text {
    std::string text;
};

static thread_local std::string g_error;

template <typename F>
static int32_t guard(F && f) {
    try {
        g_error.clear();
        return f();
    } catch (const kvl_chat_error & e) {
        g_error = e.what();
        return e.status;
    } catch (const std::exception & e) {
        g_error = e.what();
        return KVL_CHAT_ERR_INTERNAL;
    } catch (...) {
        g_error = "unknown exception";
        return KVL_CHAT_ERR_INTERNAL;
    }
}

static void check(bool valid, const char * message) {
    if (!valid) {
        throw kvl_chat_error(KVL_CHAT_ERR_ARGUMENT, message);
    }
}

static std::string given(const char * text, size_t n, const char * name) {
    check(text || n == 0, name);
    return std::string(text ? text : "", n);
}

static kvl_limits for_request(const kvl_limits & limits, size_t n) {
    return { limits.seconds, std::min(limits.n_bytes + COPIES*(int64_t) std::min<size_t>(n, MAX_BYTES), std::max(limits.n_bytes, MAX_BYTES)) };
}

static void run(const kvl_limits & limits, int32_t status_of_exceptions, std::function<void()> f) {
    std::string message;
    const int32_t status = kvl_run_limited(limits, status_of_exceptions, std::move(f), message);
    if (status != KVL_CHAT_OK) {
        throw kvl_chat_error(status, message);
    }
}

// the destructors of what a template made recurse, and need the stack that made it
template <typename T>
static void destroy(const kvl_limits & limits, std::shared_ptr<T> & p) {
    std::string message;
    auto last = std::make_shared<std::shared_ptr<T>>(std::move(p));
    kvl_run_limited(limits, KVL_CHAT_ERR_INTERNAL, [last = std::move(last)] { last->reset(); }, message);
}

// f fills what is given, which is destroyed as it has to be if it fails
template <typename T, typename F>
static void run_for(const kvl_limits & limits, const kvl_limits & now, int32_t status_of_exceptions, std::shared_ptr<T> & made, F && f) {
    try {
        run(now, status_of_exceptions, [made, f] { f(*made); });
    } catch (...) {
        destroy(limits, made);
        throw;
    }
}

static json parse_request(const std::string & text) {
    try {
        json request = json::parse(text);
        check(request.is_object() && request.contains("messages"), "the request has no messages");
        return request;
    } catch (const common_json_error &) {
        throw kvl_chat_error(KVL_CHAT_ERR_ARGUMENT, "the request is no JSON");
    }
}

static void quiet() {
    static std::once_flag once;
    // llama.cpp's log has a thread of its own, which does not start like this
    std::call_once(once, [] { common_log_set_verbosity_thold(-1); });
}

static std::string date(std::time_t time, const char * format) {
    char text[64];
    std::tm local = {};
    localtime_r(&time, &local);
    return std::string(text, std::strftime(text, sizeof(text), format, &local));
}

static std::string render(const common_chat_template & plain, const json & request) {
    json messages = request.at("messages");
    if (!plain.caps.supports_string_content && plain.caps.supports_typed_content) {
        for (auto & message : messages) {
            if (message.is_object() && message.contains("content") && message.at("content").is_string()) {
                message["content"] = json::array({ json{ { "type", "text" }, { "text", message.at("content").get<std::string>() } } });
            }
        }
    }

    const std::time_t now = request.contains("now") ? (std::time_t) request.at("now").get<int64_t>() : std::time(nullptr);

    // as common_chat_templates_apply has it
    json globals = {
        { "messages",        messages          },
        { "bos_token",       plain.bos_token() },
        { "eos_token",       plain.eos_token() },
        { "enable_thinking", request.value("enable_thinking", true) },
        { "datetime",        date(now, "%b %d %Y") },
        { "date_string",     date(now, "%d %b %Y") },
    };
    if (request.contains("tools")) {
        globals["tools"] = request.at("tools");
    }
    if (request.value("add_generation_prompt", false)) {
        globals["add_generation_prompt"] = true;
    }

    jinja::context context(plain.source());
    context.current_time = now;
    jinja::global_from_json(context, globals, false);

    jinja::runtime runtime(context);
    return jinja::runtime::gather_string_parts(runtime.execute(plain.prog))->as_string().str();
}

static json strings(const std::vector<std::string> & texts) {
    json result = json::array();
    for (const auto & text : texts) {
        result.push_back(text);
    }
    return result;
}

static json described(const common_chat_params & params) {
    json triggers = json::array();
    for (const auto & trigger : params.grammar_triggers) {
        triggers.push_back({ { "type", (int) trigger.type }, { "value", trigger.value } });
    }
    return json{
        { "prompt",            params.prompt                       },
        { "generation_prompt", params.generation_prompt            },
        { "supports_thinking", params.supports_thinking            },
        { "thinking_start",    params.thinking_start_tag           },
        { "thinking_ends",     strings(params.thinking_end_tags)   },
        { "stops",             strings(params.additional_stops)    },
        { "preserved_tokens",  strings(params.preserved_tokens)    },
        { "delimiters",        params.message_delimiters.to_json() },
        { "grammar",           params.grammar                      },
        { "grammar_lazy",      params.grammar_lazy                 },
        { "grammar_triggers",  triggers                            },
    };
}

int32_t kvl_chat_api_version(void) {
    return KVL_CHAT_API_VERSION;
}

const char * kvl_chat_last_error(void) {
    return g_error.c_str();
}

int32_t kvl_chat_compile(
        const char * source, size_t n_source, const char * bos, size_t n_bos, const char * eos, size_t n_eos,
        double seconds, int64_t n_bytes, kvl_chat ** chat) {
    return guard([&]() -> int32_t {
        check(chat != nullptr, "chat is null");
        check(seconds > 0 && seconds < 1e6, "seconds is not positive, or too large");
        check(n_bytes >= 1 << 20 && n_bytes <= MAX_BYTES, "n_bytes is not between a megabyte and a gigabyte");
        *chat = nullptr;
        quiet();

        const std::string text = given(source, n_source, "source is null");
        const std::string bos_token = given(bos, n_bos, "bos is null");
        const std::string eos_token = given(eos, n_eos, "eos is null");
        check(!text.empty(), "the template is empty");

        const kvl_limits limits = { seconds, n_bytes };
        auto result = std::make_shared<compiled>();

        run_for(limits, for_request(limits, n_source), KVL_CHAT_ERR_TEMPLATE, result, [=](compiled & made) {
            // first, because its errors say what is wrong
            common_chat_template(text, bos_token, eos_token);
            made.families = common_chat_templates_init(nullptr, text, bos_token, eos_token);
            made.plain = std::make_unique<common_chat_template>(common_chat_templates_source(made.families.get()), bos_token, eos_token);
        });

        *chat = new kvl_chat{ result, limits };
        return KVL_CHAT_OK;
    });
}

int32_t kvl_chat_render(const kvl_chat * chat, const char * request, size_t n_request, kvl_chat_text ** text) {
    return guard([&]() -> int32_t {
        check(chat && text, "chat or text is null");
        *text = nullptr;

        const std::string asked = given(request, n_request, "request is null");
        auto result = std::make_shared<std::string>();

        run(for_request(chat->limits, n_request), KVL_CHAT_ERR_TEMPLATE, [=, templates = chat->templates] {
            *result = render(*templates->plain, parse_request(asked));
        });

        *text = new kvl_chat_text{ std::move(*result) };
        return KVL_CHAT_OK;
    });
}

int32_t kvl_chat_apply(const kvl_chat * chat, const char * request, size_t n_request, kvl_chat_format ** format, kvl_chat_text ** text) {
    return guard([&]() -> int32_t {
        check(chat && format && text, "chat, format or text is null");
        *format = nullptr;
        *text   = nullptr;

        const std::string asked = given(request, n_request, "request is null");
        auto result = std::make_shared<std::string>();
        auto parser = std::make_shared<common_chat_parser_params>();

        run_for(chat->limits, for_request(chat->limits, n_request), KVL_CHAT_ERR_TEMPLATE, parser,
                [=, templates = chat->templates](common_chat_parser_params & made) {
            const json request = parse_request(asked);

            common_chat_templates_inputs inputs;
            inputs.messages              = common_chat_msgs_parse_oaicompat(request.at("messages"));
            inputs.add_generation_prompt = request.value("add_generation_prompt", false);
            inputs.reasoning_format      = COMMON_REASONING_FORMAT_DEEPSEEK;
            inputs.enable_thinking       = request.value("enable_thinking", true);
            if (request.contains("tools")) {
                inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
            }
            if (request.contains("tool_choice")) {
                inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.at("tool_choice").get<std::string>());
            }
            if (request.contains("parallel_tool_calls")) {
                inputs.parallel_tool_calls = request.at("parallel_tool_calls").get<bool>();
            }
            if (request.contains("now")) {
                inputs.now = std::chrono::system_clock::from_time_t((std::time_t) request.at("now").get<int64_t>());
            }
            if (request.contains("json_schema")) {
                inputs.json_schema = request.at("json_schema").dump();
            }

            const auto params = common_chat_templates_apply(templates->families.get(), inputs);

            made = common_chat_parser_params(params);
            made.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
            made.parse_tool_calls = !inputs.tools.empty();
            if (!params.parser.empty()) {
                made.parser.load(params.parser);
            }
            *result = described(params).dump_safe();
        });

        auto text_found = std::make_unique<kvl_chat_text>(kvl_chat_text{ std::move(*result) });
        *format = new kvl_chat_format{ parser, chat->limits };
        *text   = text_found.release();
        return KVL_CHAT_OK;
    });
}

int32_t kvl_chat_parse(const kvl_chat_format * format, const char * answer, size_t n_answer, int32_t is_partial, kvl_chat_text ** text) {
    return guard([&]() -> int32_t {
        check(format && text, "format or text is null");
        *text = nullptr;

        const std::string said = given(answer, n_answer, "answer is null");
        auto result = std::make_shared<std::string>();

        run(for_request(format->limits, n_answer), KVL_CHAT_ERR_PARSE, [=, parser = format->parser] {
            const auto message = common_chat_parse(said, is_partial != 0, *parser);

            json calls = json::array();
            for (const auto & call : message.tool_calls) {
                calls.push_back({ { "name", call.name }, { "arguments", call.arguments }, { "id", call.id } });
            }
            *result = json{
                { "content",           message.render_content()  },
                { "reasoning_content", message.reasoning_content },
                { "tool_calls",        calls                     },
            }.dump_safe();
        });

        *text = new kvl_chat_text{ std::move(*result) };
        return KVL_CHAT_OK;
    });
}

const char * kvl_chat_text_data(const kvl_chat_text * text) {
    return text ? text->text.data() : nullptr;
}

size_t kvl_chat_text_size(const kvl_chat_text * text) {
    return text ? text->text.size() : 0;
}

void kvl_chat_free(kvl_chat * chat) {
    guard([&]() -> int32_t {
        std::unique_ptr<kvl_chat> owned(chat);
        if (chat) {
            destroy(chat->limits, chat->templates);
        }
        return KVL_CHAT_OK;
    });
}

void kvl_chat_format_free(kvl_chat_format * format) {
    guard([&]() -> int32_t {
        std::unique_ptr<kvl_chat_format> owned(format);
        if (format) {
            destroy(format->limits, format->parser);
        }
        return KVL_CHAT_OK;
    });
}

void kvl_chat_text_free(kvl_chat_text * text) {
    delete text;
}
