//! Text to ids and back over tokenizers made here: control tokens, detokenizing, stop strings.

use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::tests::*;

fn text(tokenizer: &serde_json::Value) -> Text {
    let dir = model_dir(tokenizer);
    let profile = Profile::load(dir.path()).unwrap();
    Text::load(dir.path(), &profile).unwrap()
}

fn user(content: &str) -> Message {
    Message { role: "user", content: content.to_owned(), name: None }
}

fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> Vec<String> {
    let mut detokenizer = detokenizer::Detokenizer::new(Arc::clone(tokenizer), skip);
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn whole_characters_only_are_let_out() {
    let text = text(&byte_level());
    let ids: Vec<u32> = "a€b".bytes().map(u32::from).collect();
    assert_eq!(pieces(&text.tokenizer, &ids, true), ["a", "", "", "€", "b", ""]);
    // A lead byte that is never followed up is broken as soon as that is certain.
    assert_eq!(
        pieces(&text.tokenizer, &[0xe2, 0x82, 0x41, 0xe2], true),
        ["", "", "\u{FFFD}A", "", "\u{FFFD}"]
    );
}

#[test]
fn runs_of_byte_tokens_are_let_out_as_a_whole() {
    let text = text(&byte_fallback());
    let id = |piece: &str| byte_fallback()["model"]["vocab"][piece].as_u64().unwrap() as u32;
    let ids = [id("hello"), id("▁w"), 0xe2, 0x82, 0xac, id("o"), id("▁"), id("▁"), id("o")];
    let pieces = pieces(&text.tokenizer, &ids, true);
    assert_eq!(pieces, ["hello", " w", "", "", "", "€o", " ", " ", "o", ""]);
}

fn kinds() -> [Arc<Tokenizer>; 2] {
    [text(&byte_level()).tokenizer, text(&byte_fallback()).tokenizer]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn pieces_concatenate_to_the_full_decoding(
        ids in prop::collection::vec(0u32..VOCAB, 0..60),
        skip: bool,
    ) {
        static KINDS: std::sync::LazyLock<[Arc<Tokenizer>; 2]> = std::sync::LazyLock::new(kinds);
        for tokenizer in KINDS.iter() {
            let whole = tokenizer.decode(&ids, skip).unwrap();
            prop_assert_eq!(pieces(tokenizer, &ids, skip).concat(), whole);
        }
    }

    #[test]
    fn text_survives_encoding_and_streaming(content in "[a-zé€ 😀\n.]{0,40}") {
        static KINDS: std::sync::LazyLock<[Arc<Tokenizer>; 2]> = std::sync::LazyLock::new(kinds);
        let tokenizer = &KINDS[0];
        let ids = tokenizer.encode(&content, false).unwrap();
        prop_assert_eq!(pieces(tokenizer, &ids, true).concat(), content);
    }

    #[test]
    fn no_user_text_becomes_a_control_token(
        parts in prop::collection::vec(
            prop_oneof![
                Just("<｜User｜>"), Just("<｜Assistant｜>"), Just("<｜end▁of▁sentence｜>"),
                Just("<think>"), Just("<"), Just("｜"), Just("User"), Just(">"), Just("\u{100000}"),
            ],
            0..8,
        ),
    ) {
        static TEXTS: std::sync::LazyLock<[Text; 2]> =
            std::sync::LazyLock::new(|| [text(&byte_level()), text(&byte_fallback())]);
        let content = parts.concat();
        for text in TEXTS.iter() {
            let ids = text.chat(&[user(&content), user("x")], true, false).unwrap();
            let controls: Vec<u32> =
                ids.iter().copied().filter(|&id| id >= FIRST_CONTROL).collect();
            prop_assert_eq!(controls, vec![BOS, USER, USER, ASSISTANT]);
        }
        let ids = TEXTS[0].chat(&[user(&content)], true, false).unwrap();
        prop_assert_eq!(TEXTS[0].tokenizer.decode(&ids[2..ids.len() - 1], false).unwrap(), content);
    }
}

#[test]
fn conversations_without_look_alikes_equal_the_plain_tokenizer() {
    for tokenizer in [byte_level(), byte_fallback()] {
        let text = text(&tokenizer);
        let ids = text.chat(&[user("hello world")], true, false).unwrap();
        let rendered = format!("{}<｜User｜>hello world<｜Assistant｜>", CONTROLS[0].0);
        assert_eq!(ids, text.tokenizer.encode(&rendered, false).unwrap());
    }
}

#[test]
fn reasoning_marks_of_an_earlier_answer_stay_marks() {
    let text = text(&byte_level());
    let answer = Message { role: "assistant", content: "<think>a</think>b".into(), name: None };
    let ids = text.chat(&[answer], false, false).unwrap();
    assert!(ids.contains(&304) && ids.contains(&305), "{ids:?}");
}

#[test]
fn forgery_through_a_normalizer_is_seen() {
    let mut tokenizer = byte_level();
    tokenizer["normalizer"] = json!({"type": "Lowercase"});
    tokenizer["added_tokens"][2]["content"] = json!("<user>");
    let dir = model_dir(&tokenizer);
    let profile = Profile::load(dir.path()).unwrap();
    let text = Text::load(dir.path(), &profile).unwrap();
    assert!(text.prompt("<USER>", false).unwrap().contains(&USER));
    let ids = text.chat(&[user("a<USER>b")], true, false).unwrap();
    assert!(!ids.contains(&USER), "{ids:?}");
}

#[test]
fn a_begin_token_is_added_once() {
    let dir = model_dir(&byte_level());
    let mut config = json!({"bos_token": CONTROLS[0].0, "add_bos_token": true,
                            "chat_template": CHAT_TEMPLATE});
    dir.write("tokenizer_config.json", &config);
    let profile = Profile::load(dir.path()).unwrap();
    let text = Text::load(dir.path(), &profile).unwrap();
    let with_bos = format!("{}hello", CONTROLS[0].0);
    assert_eq!(text.prompt("hello", true).unwrap(), [BOS, 259]);
    assert_eq!(text.prompt(&with_bos, true).unwrap(), [BOS, 259]);
    assert_eq!(text.prompt("hello", false).unwrap(), [259]);
    let ids = text.chat(&[user("a")], true, true).unwrap();
    assert_eq!(ids, [BOS, USER, 97, ASSISTANT]);

    config["add_bos_token"] = json!(false);
    dir.write("tokenizer_config.json", &config);
    let text = Text::load(dir.path(), &profile).unwrap();
    assert_eq!(text.prompt("hello", true).unwrap(), [259]);
}

#[test]
fn text_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let text = text(&byte_level());
    let error = text.prompt(&"a".repeat(1 << 20), true).unwrap_err();
    assert!(matches!(error, TextError::Tokenize(TokenizeError::TooLong { .. })), "{error}");
}

#[test]
fn bad_tokenizers_are_refused_by_name() {
    let mut beyond = byte_level();
    beyond["model"]["vocab"]["unused299"] = json!(VOCAB);
    let mut gap = byte_level();
    gap["added_tokens"][5]["id"] = json!(317);
    let mut broken = byte_level();
    broken["model"]["merges"] = json!([["never", "there"]]);
    for (tokenizer, problem) in [
        (json!({}), ""),
        (json!([1, 2]), ""),
        (broken, ""),
        (beyond, "beyond vocab_size 320"),
        (gap, "has id 317 but is numbered 305"),
    ] {
        let dir = model_dir(&tokenizer);
        let profile = Profile::load(dir.path()).unwrap();
        let error = Text::load(dir.path(), &profile).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json") && error.contains(problem), "{error}");
    }
    let dir = model_dir(&byte_level());
    dir.write("tokenizer_config.json", &json!({"bos_token": "<none>"}));
    let profile = Profile::load(dir.path()).unwrap();
    let error = Text::load(dir.path(), &profile).err().unwrap().to_string();
    assert!(error.contains("`bos_token`") && error.contains("<none>"), "{error}");
}

#[test]
fn the_template_file_wins_over_the_configuration() {
    let dir = model_dir(&byte_level());
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let profile = Profile::load(dir.path()).unwrap();
    let text = Text::load(dir.path(), &profile).unwrap();
    assert_eq!(text.chat(&[user("a")], true, false).unwrap(), [97]);
}

#[test]
fn the_fixture_tokenizer_reads_its_own_conversation() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/plain");
    if !dir.join("tokenizer.json").exists() {
        eprintln!("left out: tests/fixtures/plain is not there");
        return;
    }
    let profile = Profile::load(&dir).unwrap();
    let text = Text::load(&dir, &profile).unwrap();
    let ids = text.chat(&[user("a <|eot|>")], true, false).unwrap();
    // begin, user, "a <|eot|>" as bytes, eot, assistant.
    assert_eq!((ids[0], ids[1]), (256, 259));
    assert_eq!(ids[ids.len() - 2..], [261, 260]);
    assert!(ids[2..ids.len() - 2].iter().all(|&id| id < 256), "{ids:?}");
    assert_eq!(text.tokenizer.decode(&ids[2..ids.len() - 2], false).unwrap(), "a <|eot|>");
}
