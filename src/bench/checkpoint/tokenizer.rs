//! A byte-level BPE tokenizer of any size, made up by rule: bytes, then pairs of
//! letters, then pairs of those. It stands for a real one of that vocabulary; what
//! it splits text into has no meaning.

use serde_json::{Map, Value, json};

/// Ids below this mean the begin and the end of a text.
const SPECIAL: [&str; 2] = ["<|bos|>", "<|eos|>"];
/// A step through all pairs of pairs that has no factor in common with their
/// number (676²), so that it meets each once.
const STRIDE: usize = 190_027;

/// `tokenizer.json` of `vocab` tokens, of which there have to be 258 at least.
pub fn tokenizer(vocab: usize) -> Value {
    let mut ids = Map::new();
    let mut put = |token: &str| {
        let id = ids.len();
        ids.insert(token.to_owned(), json!(id));
    };
    SPECIAL.iter().for_each(|token| put(token));
    alphabet().iter().for_each(|letter| put(&letter.to_string()));
    let merges = merges(vocab - SPECIAL.len() - 256);
    merges.iter().for_each(|[first, second]| put(&format!("{first}{second}")));
    let special = |(id, token): (usize, &&str)| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let bytes = |regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": regex,
        })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": SPECIAL.iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": bytes(true), "post_processor": null,
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": ids, "merges": merges,
        },
    })
}

/// `tokenizer_config.json`
pub fn settings(context: usize) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1], "clean_up_tokenization_spaces": false,
        "model_max_length": context,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    })
}

/// `generation_config.json`
pub fn generation() -> Value {
    json!({ "bos_token_id": 0, "eos_token_id": 1 })
}

/// The characters that stand for bytes 0 to 255, as GPT-2 chose them: printable
/// ones for themselves, the others moved beyond 255.
fn alphabet() -> Vec<char> {
    let mut moved = 0x100..;
    (0..=0xffu8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            // The range has no end.
            _ => moved.next().and_then(char::from_u32).unwrap_or('\u{fffd}'),
        })
        .collect()
}

/// `count` merges, each of tokens that come before it.
fn merges(count: usize) -> Vec<[String; 2]> {
    let letters: Vec<String> = ('a'..='z').map(String::from).collect();
    let pair = |n: usize| [letters[n / 26].clone(), letters[n % 26].clone()];
    let pairs = letters.len() * letters.len();
    let spaced = |n: usize| ["Ġ".to_owned(), pair(n).concat()];
    let fours = (0..pairs * pairs).map(|n| {
        let n = n * STRIDE % (pairs * pairs);
        [pair(n / pairs).concat(), pair(n % pairs).concat()]
    });
    (0..pairs).map(pair).chain((0..pairs).map(spaced)).chain(fours).take(count).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_id_has_a_token_and_merges_only_join_known_ones() {
        for vocab in [258, 300, 1024, 49_152] {
            let made = tokenizer(vocab);
            let ids = made["model"]["vocab"].as_object().unwrap();
            assert_eq!(ids.len(), vocab);
            let used: HashSet<u64> = ids.values().map(|id| id.as_u64().unwrap()).collect();
            assert!(used.len() == vocab && used.iter().all(|id| *id < vocab as u64));
            for merge in made["model"]["merges"].as_array().unwrap() {
                let part = |n: usize| merge[n].as_str().unwrap();
                let id = |token: &str| ids[token].as_u64().unwrap();
                let whole = id(&format!("{}{}", part(0), part(1)));
                assert!(id(part(0)) < whole && id(part(1)) < whole);
            }
        }
    }

    #[test]
    fn the_alphabet_is_gpt2s() {
        let alphabet = alphabet();
        assert_eq!(alphabet.iter().collect::<HashSet<_>>().len(), 256);
        assert_eq!((alphabet[b' ' as usize], alphabet[b'a' as usize]), ('Ġ', 'a'));
        assert_eq!((alphabet[0], alphabet[b'\n' as usize], alphabet[0xad]), ('Ā', 'Ċ', 'Ń'));
    }
}
