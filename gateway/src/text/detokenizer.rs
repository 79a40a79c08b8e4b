//! Ids to text, one at a time. What is returned is final: a character whose
//! last bytes have not arrived is held back, and the pieces concatenated equal
//! the decoding of the whole sequence.
//!
//! Byte-level tokenizers are decoded exactly, token by token. Others go through
//! a window over the last tokens, as their decoding depends on neighbours.

use std::sync::Arc;

use super::tokenizer::{Decoding, Tokenizer, byte_piece};

/// Tokens held back at most, when they never become whole characters.
const MAX_HELD: usize = 64;

/// One sequence's state.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

enum State {
    /// Up to three bytes of an unfinished character.
    Bytes(Vec<u8>),
    Window(Window),
}

#[derive(Default)]
struct Window {
    /// Tokens still needed: those before `read` give context, the rest are held.
    ids: Vec<u32>,
    read: usize,
}

impl Detokenizer {
    /// `skip_special` leaves special tokens out of the text.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let state = match tokenizer.decoding() {
            Decoding::ByteLevel => State::Bytes(Vec::new()),
            Decoding::ByteFallback | Decoding::Other => State::Window(Window::default()),
        };
        Self { tokenizer, skip_special, state }
    }

    /// The text that `id` completes.
    pub fn push(&mut self, id: u32) -> String {
        // An unused id has no text, and does not end a run of byte tokens either.
        let unused = self.tokenizer.piece(id).is_none();
        if unused || self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        match &mut self.state {
            State::Bytes(held) => {
                held.extend(self.tokenizer.bytes(id));
                take_text(held, false)
            }
            State::Window(window) => {
                window.ids.push(id);
                if window.held() < MAX_HELD && window.unfinished(&self.tokenizer) {
                    return String::new();
                }
                window.advance(&self.tokenizer, window.held() >= MAX_HELD)
            }
        }
    }

    /// What was held back, with U+FFFD for characters that stay unfinished.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(held) => take_text(held, true),
            State::Window(window) => window.advance(&self.tokenizer, true),
        }
    }
}

/// Takes the whole characters off `held`, each maximal invalid part as U+FFFD.
/// Leaves an unfinished last character unless `last`.
fn take_text(held: &mut Vec<u8>, last: bool) -> String {
    let mut text = String::new();
    let mut rest = held.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, invalid) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                rest = invalid;
                match error.error_len() {
                    None if !last => break,
                    broken => {
                        text.push('\u{FFFD}');
                        rest = &rest[broken.unwrap_or(rest.len())..];
                    }
                }
            }
        }
    }
    *held = rest.to_vec();
    text
}

impl Window {
    fn held(&self) -> usize {
        self.ids.len() - self.read
    }

    /// A run of byte tokens is decoded as a whole, so it waits for its end.
    fn unfinished(&self, tokenizer: &Tokenizer) -> bool {
        tokenizer.decoding() == Decoding::ByteFallback
            && self
                .ids
                .last()
                .and_then(|&id| tokenizer.piece(id))
                .is_some_and(|piece| byte_piece(&piece).is_some())
    }

    fn advance(&mut self, tokenizer: &Tokenizer, last: bool) -> String {
        // Special tokens that are to be skipped never enter the window.
        let decode = |ids: &[u32]| tokenizer.decode(ids, false).unwrap_or_default();
        let (before, now) = (decode(&self.ids[..self.read]), decode(&self.ids));
        if !last && now.ends_with('\u{FFFD}') && self.held() < MAX_HELD {
            return String::new();
        }
        match now.strip_prefix(before.as_str()) {
            Some("") | None if !last => String::new(),
            added => {
                let added = added.unwrap_or_default().to_owned();
                self.ids.drain(..self.read);
                self.read = self.ids.len();
                added
            }
        }
    }
}
