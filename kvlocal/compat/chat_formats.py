"""Chat templates by the names that llama-cpp-python's `chat_format` has for them, in place of the one in a model's file."""

from kvlocal.compat.errors import NotSupported
from kvlocal.template.defaults import CHATML, GEMMA

_REFUSE_SYSTEM = "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"

# calls of tools as the Hermes models write them, which llama.cpp can read and has a grammar for
_CHATML_WITH_TOOLS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% else %}{% set system = '' %}{% endif %}"
    "{% if tools or system %}{{ '<|im_start|>system\n' + system }}"
    "{% if tools %}"
    "{{ ('\n\n' if system else '') + 'These functions can be called:\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools>\nTo call one, write\n<tool_call>\n{\"name\": <its name>, \"arguments\": <an object>}\n</tool_call>' }}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ ('\n' if message['content'] or not loop.first else '') + '<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

_LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}" + _REFUSE_SYSTEM + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

FORMATS = {
    "chatml": CHATML,
    "chatml-function-calling": _CHATML_WITH_TOOLS,
    "gemma": GEMMA,
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "mistral-instruct": _MISTRAL,
    "zephyr": _ZEPHYR,
}


def template_of(chat_format: str) -> str:
    """The Jinja source of a format.

    Raises:
        NotSupported: there is none of that name.
    """
    if chat_format not in FORMATS:
        raise NotSupported(f"kvlocal has no chat_format {chat_format!r}: leave it out for the model's own template, or use {', '.join(FORMATS)}")
    return FORMATS[chat_format]
