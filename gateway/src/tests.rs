//! What the tests of several rooms share: scratch model directories with small
//! tokenizers of the kinds that models ship with.

mod absence;
mod bad_input;
pub mod client;
pub mod router;
pub mod serving;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// A directory that goes away with the test.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, content: &Value) {
        std::fs::write(self.0.join(name), content.to_string()).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn scratch() -> Scratch {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name =
        format!("moemesh-gateway-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&path).unwrap();
    Scratch(path)
}

/// Names of control tokens, from id 300 on, with DeepSeek's `special` flags.
pub const CONTROLS: [(&str, bool); 6] = [
    ("<｜begin▁of▁sentence｜>", true),
    ("<｜end▁of▁sentence｜>", true),
    ("<｜User｜>", false),
    ("<｜Assistant｜>", false),
    ("<think>", false),
    ("</think>", false),
];
pub const FIRST_CONTROL: u32 = 300;
pub const BOS: u32 = 300;
pub const EOS: u32 = 301;
pub const USER: u32 = 302;
pub const ASSISTANT: u32 = 303;
pub const VOCAB: u32 = 320;

/// `normalized` is as DeepSeek's are: only tokens that are not special.
fn added(normalized: bool) -> Vec<Value> {
    CONTROLS
        .iter()
        .zip(FIRST_CONTROL..)
        .map(|((content, special), id)| {
            json!({"id": id, "content": content, "special": special, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": normalized && !special})
        })
        .collect()
}

/// GPT-2's printable stand-in for a byte.
fn stand_in(byte: u8) -> char {
    let plain = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !plain(b)).count();
    char::from_u32(0x100 + rank as u32).unwrap()
}

/// Unreachable entries up to the first control token: ids must leave no gap.
fn fill(vocab: &mut serde_json::Map<String, Value>) {
    for id in vocab.len() as u32..FIRST_CONTROL {
        vocab.insert(format!("unused{id}"), json!(id));
    }
}

/// Byte-level BPE: ids 0..256 are the bytes, then a few merges.
pub fn byte_level() -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|b| (stand_in(b).to_string(), json!(b))).collect();
    let mut merges = Vec::new();
    for (id, (a, b)) in (256..).zip([
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("Ã", "©"),
        ("Ġ", "Ġ"),
    ]) {
        vocab.insert(format!("{a}{b}"), json!(id));
        merges.push(json!([a, b]));
    }
    fill(&mut vocab);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added(true),
        "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                          "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true,
                    "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
}

/// SentencePiece-like BPE with byte fallback, as Llama 2 ships it.
pub fn byte_fallback() -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|b| (format!("<0x{b:02X}>"), json!(b))).collect();
    for (piece, id) in ["▁", "h", "e", "l", "o", "w", "▁w", "he", "ll", "hell", "hello", "é", "."]
        .iter()
        .zip(256..)
    {
        vocab.insert((*piece).to_owned(), json!(id));
    }
    fill(&mut vocab);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added(false),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": [["▁", "w"], ["h", "e"], ["l", "l"], ["he", "ll"],
                                              ["hell", "o"]]},
    })
}

/// A model directory with `tokenizer` and a DeepSeek-like chat template.
pub fn model_dir(tokenizer: &Value) -> Scratch {
    let dir = scratch();
    dir.write("tokenizer.json", tokenizer);
    dir.write(
        "tokenizer_config.json",
        &json!({"bos_token": CONTROLS[0].0, "eos_token": {"content": CONTROLS[1].0},
                "chat_template": CHAT_TEMPLATE}),
    );
    dir.write(
        "config.json",
        &json!({"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": EOS}),
    );
    dir
}

pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}\
{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}\
{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}";
