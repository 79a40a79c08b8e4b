//! Chat templates as models ship them, and as an attacker would.

use super::*;

fn message(role: &'static str, content: &str) -> Message {
    Message { role, content: content.to_owned(), name: None }
}

fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
    ChatTemplate::compile(source.to_owned(), "<s>", "</s>").unwrap().render(messages, true)
}

/// Written after the shape of DeepSeek-V3's: a namespace gathers the system
/// prompt first, then turns follow without separators.
const DEEPSEEK_LIKE: &str = "{% if not add_generation_prompt is defined %}\
{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}\
{% set ns.is_first_sp = false %}{%- else %}\
{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}\
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}\
{%- for message in messages %}{%- if message['role'] == 'user' %}\
{{'<｜User｜>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}\
{% set content = message['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}";

#[test]
fn a_deepseek_like_template_renders_as_jinja2_does() {
    let messages = [
        message("system", "Be brief."),
        message("user", "Hi"),
        message("assistant", "<think>hm</think>Hello"),
        message("system", "Be kind."),
        message("user", "Bye"),
    ];
    assert_eq!(
        render(DEEPSEEK_LIKE, &messages).unwrap(),
        "<s>Be brief.\n\nBe kind.<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜>\
         <｜User｜>Bye<｜Assistant｜>"
    );
}

#[test]
fn blocks_are_trimmed_and_stripped_as_transformers_does() {
    let source = "{% for m in messages %}\n  {% if loop.first %}\n[{{ m.role }}]\n  {% endif %}\n\
                  {{ m.content | trim }}\n{% endfor %}\n";
    let messages = [message("user", " a "), message("assistant", "b")];
    assert_eq!(render(source, &messages).unwrap(), "[user]\na\nb\n");
}

#[test]
fn python_methods_loop_controls_and_tojson_work() {
    let source = "{% for m in messages %}{% if m.content.startswith('x') %}{% continue %}\
                  {% endif %}{{ m.content.upper().strip() }}{% endfor %}\
                  {{ {'a': [1, '<é>']} | tojson }}{{ [1, 2] | tojson(indent=2) }}";
    let messages = [message("user", "x no"), message("user", " yes ")];
    assert_eq!(render(source, &messages).unwrap(), "YES{\"a\": [1, \"<é>\"]}[\n  1,\n  2\n]");
}

#[test]
fn names_reach_the_template_and_absent_ones_are_undefined() {
    let source = "{% for m in messages %}{{ m.name if m.name is defined else '-' }}{% endfor %}";
    let mut named = message("user", "a");
    named.name = Some("bo".to_owned());
    assert_eq!(render(source, &[named, message("user", "b")]).unwrap(), "bo-");
}

#[test]
fn the_templates_own_refusal_is_told_apart() {
    let source = "{{ raise_exception('roles must alternate') }}";
    let refused = render(source, &[]).unwrap_err();
    assert!(matches!(refused, TemplateError::Raised(ref m) if m == "roles must alternate"));
}

#[test]
fn endless_templates_run_out_of_fuel() {
    let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a * b %}\
                  {% endfor %}{% endfor %}";
    let error = render(source, &[]).unwrap_err().to_string();
    assert!(error.contains("fuel"), "{error}");
}

#[test]
fn templates_that_do_not_compile_are_refused() {
    let error = ChatTemplate::compile("a\n{% if %}".to_owned(), "", "").err().unwrap();
    assert!(describe(&error).contains("line 2"), "{}", describe(&error));
}
