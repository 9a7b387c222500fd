// Grammars that come from outside: what llama.cpp's parser would report on stderr, or not survive, becomes an error.

#include "kvlocal-impl.h"

#include "llama-grammar.h"

#include <cstring>
#include <memory>

// the parser recurses into parentheses, and the search for left recursion into rules
static constexpr int64_t MAX_BYTES = 1 << 20;
static constexpr int32_t MAX_DEPTH = 200;
static constexpr size_t  MAX_RULES = 20000;

static void refuse(bool wrong, const std::string & why) {
    if (wrong) {
        throw kvl_error(KVL_ERR_ARGUMENT, why);
    }
}

// how deep parentheses are nested at most, those in texts and sets not counted
static int32_t depth_of(const std::string & text) {
    int32_t depth = 0;
    int32_t most  = 0;
    char    until = 0; // what ends the text, set or comment around this character

    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];

        if (until) {
            if (c == '\\' && until != '\n') {
                i++;
            } else if (c == until) {
                until = 0;
            }
        } else if (c == '"' || c == '#') {
            until = c == '"' ? '"' : '\n';
        } else if (c == '[') {
            until = ']';
        } else if (c == '(') {
            most = std::max(most, ++depth);
        } else if (c == ')') {
            depth--;
        }
    }

    return most;
}

static const char * first_rule(const char * pos) {
    while (*pos == '#' || strchr(" \t\r\n", *pos)) {
        if (!*pos) {
            break;
        }
        pos += *pos == '#' ? strcspn(pos, "\r\n") : 1;
    }
    return pos;
}

// the first line of what llama.cpp says; behind it comes the rest of the grammar
static std::string reason(const std::exception & e) {
    const std::string text = e.what();
    return text.substr(0, std::min<size_t>(text.find('\n'), 100));
}

void kvl_check_grammar(const llama_vocab * vocab, const std::string & text) {
    refuse((int64_t) text.size() > MAX_BYTES, "it is longer than a megabyte");
    refuse(text.find('\0') != std::string::npos, "it has a zero in it");
    refuse(depth_of(text) > MAX_DEPTH, "its parentheses are nested too deeply");

    llama_grammar_parser parser(vocab);

    try {
        for (const char * pos = first_rule(text.c_str()); *pos; ) {
            pos = parser.parse_rule(pos);
            refuse(parser.rules.size() > MAX_RULES, "it has too many rules");
        }
    } catch (const kvl_error &) {
        throw;
    } catch (const std::exception & e) {
        refuse(true, reason(e));
    }

    for (const auto & symbol : parser.symbol_ids) {
        refuse(symbol.second >= parser.rules.size() || parser.rules[symbol.second].empty(), "there is no rule " + symbol.first);
    }
    refuse(parser.symbol_ids.find("root") == parser.symbol_ids.end(), "there is no rule root");

    const std::unique_ptr<llama_grammar, decltype(&llama_grammar_free_impl)> grammar(
        llama_grammar_init_impl(vocab, text.c_str(), "root", false, nullptr, 0, nullptr, 0), llama_grammar_free_impl);

    refuse(!grammar, "a rule begins with itself");
}
