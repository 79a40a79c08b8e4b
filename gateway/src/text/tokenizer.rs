//! `tokenizer.json` through the `tokenizers` crate, and what its configuration
//! adds: begin and end tokens, and which ids are control tokens.
//!
//! Refuses at load an id beyond the model's vocabulary, and at run time a text
//! so long that it cannot fit the context, before it is tokenised. A checkpoint
//! without tokenizer serves token ids only: text is refused, ids have no text.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer as Inner;

use crate::error::LoadError;
use crate::profile::{Document, Profile, read_limited};

/// Knows no token; stands in for a tokenizer that is not there.
const EMPTY: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,
"model":{"type":"BPE","vocab":{},"merges":[]}}"#;

/// The largest published tokenizers have some 30 MB.
const MAX_TOKENIZER_BYTES: u64 = 128 << 20;

/// Why a text was not tokenised.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    #[error("text of {bytes} bytes cannot fit the context of {context} tokens")]
    TooLong { bytes: usize, context: u32 },
    #[error("tokenizer failed: {0}")]
    Failed(String),
    #[error("the model came without tokenizer.json: send token ids")]
    Absent,
}

/// An added token that means something to the model rather than to a reader.
#[derive(Clone, Debug)]
pub struct Control {
    pub id: u32,
    pub content: String,
    /// Swallows white space before it.
    pub lstrip: bool,
    /// Swallows white space after it.
    pub rstrip: bool,
    /// Matched after the normalizer has run.
    pub normalized: bool,
}

/// How ids become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoding {
    /// Each token stands for bytes, whatever its neighbours.
    ByteLevel,
    /// Bytes that UTF-8 cannot spell come as `<0x41>` tokens, decoded in runs.
    ByteFallback,
    /// Anything else that the `tokenizers` crate decodes.
    Other,
}

/// The tokenizer of the served model.
pub struct Tokenizer {
    inner: Inner,
    /// The same, with every control token read as plain text.
    plain: Inner,
    /// False when the checkpoint has none.
    present: bool,
    controls: BTreeMap<u32, Control>,
    decoding: Decoding,
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    byte_cap: usize,
    context: u32,
}

impl Tokenizer {
    /// Loads `dir/tokenizer.json`; `config` is `tokenizer_config.json`.
    pub(crate) fn load(
        dir: &Path,
        config: Option<&Document>,
        profile: &Profile,
    ) -> Result<Self, LoadError> {
        let path = dir.join("tokenizer.json");
        let present = path.exists();
        let bytes = match present {
            true => read_limited(&path, MAX_TOKENIZER_BYTES)?,
            false => EMPTY.as_bytes().to_vec(),
        };
        let failed = |problem| LoadError::Tokenizer { path: path.clone(), problem };
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|source| LoadError::Json { path: path.clone(), source })?;
        let inner = build(&bytes).map_err(&failed)?;
        check_added(&json, &inner).map_err(&failed)?;
        let mut longest = 1;
        for (token, id) in inner.get_vocab(true) {
            if id >= profile.vocab_size {
                let size = profile.vocab_size;
                return Err(failed(format!(
                    "token `{}` has id {id}, beyond vocab_size {size}",
                    token.escape_debug()
                )));
            }
            longest = longest.max(token.len());
        }
        let controls: BTreeMap<u32, Control> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| is_control(&token.content))
            .map(|(id, token)| {
                let (lstrip, rstrip) = (token.lstrip, token.rstrip);
                let normalized = token.normalized;
                (id, Control { id, content: token.content, lstrip, rstrip, normalized })
            })
            .collect();
        let plain = build_plain(json.clone()).map_err(&failed)?;
        let decoding = decoding(&json["decoder"]);
        // A byte-level token spells at most its own length in bytes; without
        // that, an unknown token may stand for much more text.
        let slack = match (decoding, json["normalizer"].is_null()) {
            (Decoding::ByteLevel, true) => 1,
            (Decoding::ByteLevel, false) => 4,
            _ => 16,
        };
        let mut tokenizer = Self {
            inner,
            plain,
            present,
            controls,
            decoding,
            bos: None,
            eos: None,
            add_bos: None,
            add_eos: None,
            byte_cap: longest.saturating_mul(slack).saturating_mul(profile.context as usize),
            context: profile.context,
        };
        if let Some(config) = config.filter(|_| present) {
            tokenizer.configure(config)?;
        }
        Ok(tokenizer)
    }

    fn configure(&mut self, config: &Document) -> Result<(), LoadError> {
        self.bos = self.named(config, "bos_token")?;
        self.eos = self.named(config, "eos_token")?;
        self.add_bos = flag(config, "add_bos_token")?;
        self.add_eos = flag(config, "add_eos_token")?;
        if self.add_bos == Some(true) && self.bos.is_none() {
            return Err(config.refuse("add_bos_token", "is set without a bos_token"));
        }
        Ok(())
    }

    /// A token that the configuration names, as a string or as an object.
    fn named(
        &self,
        config: &Document,
        field: &'static str,
    ) -> Result<Option<(String, u32)>, LoadError> {
        let Some(value) = config.get(field) else { return Ok(None) };
        let content = value
            .as_str()
            .or_else(|| value.get("content").and_then(Value::as_str))
            .ok_or_else(|| config.refuse(field, "must be a string or have a string `content`"))?;
        let id = self.inner.token_to_id(content).ok_or_else(|| {
            config.refuse(field, format!("`{}` is not in the tokenizer", content.escape_debug()))
        })?;
        Ok(Some((content.to_owned(), id)))
    }

    /// Ids of `text`. `add_special` adds what the model expects around a text,
    /// never a second begin token.
    ///
    /// # Errors
    /// [`TokenizeError::TooLong`] before any work when no tokenisation can fit.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizeError> {
        self.check_length(text)?;
        // An explicit add_bos_token or add_eos_token replaces the post-processor.
        let explicit = self.add_bos.is_some() || self.add_eos.is_some();
        let ids = encode(&self.inner, text, add_special && !explicit)?;
        Ok(match (add_special, explicit) {
            (false, _) => ids,
            (true, true) => self.frame(ids),
            (true, false) => self.single_bos(ids),
        })
    }

    /// Ids of `text` with every control token read as plain text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        self.check_length(text)?;
        encode(&self.plain, text, false)
    }

    /// Adds the begin and end tokens that the configuration asks for, unless there.
    pub fn frame(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let (Some(true), Some((_, bos))) = (self.add_bos, &self.bos)
            && ids.first() != Some(bos)
        {
            ids.insert(0, *bos);
        }
        if let (Some(true), Some((_, eos))) = (self.add_eos, &self.eos)
            && ids.last() != Some(eos)
        {
            ids.push(*eos);
        }
        ids
    }

    fn single_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let (Some((_, bos)), [first, second, ..]) = (&self.bos, ids.as_slice())
            && first == bos
            && second == bos
        {
            ids.remove(0);
        }
        ids
    }

    fn check_length(&self, text: &str) -> Result<(), TokenizeError> {
        if !self.present {
            return Err(TokenizeError::Absent);
        }
        if text.len() > self.byte_cap {
            return Err(TokenizeError::TooLong { bytes: text.len(), context: self.context });
        }
        Ok(())
    }

    /// The whole sequence as text, as the `tokenizers` crate decodes it.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizeError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| TokenizeError::Failed(error.to_string()))
    }

    pub fn decoding(&self) -> Decoding {
        self.decoding
    }

    /// Control tokens by id.
    pub fn controls(&self) -> &BTreeMap<u32, Control> {
        &self.controls
    }

    /// True when a control token can be matched in text that the normalizer changed.
    pub fn normalizes_controls(&self) -> bool {
        self.inner.get_normalizer().is_some() && self.controls.values().any(|c| c.normalized)
    }

    pub fn bos(&self) -> Option<&str> {
        self.bos.as_ref().map(|(content, _)| content.as_str())
    }

    pub fn eos(&self) -> Option<&str> {
        self.eos.as_ref().map(|(content, _)| content.as_str())
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(_, id)| *id)
    }

    /// True for ids that `skip_special_tokens` leaves out of text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .id_to_token(id)
            .is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The token's own spelling in the vocabulary; none for an unused id.
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that one token contributes by itself; empty for an unused id.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        let Some(piece) = self.piece(id) else { return Vec::new() };
        match self.decoding {
            Decoding::ByteLevel => byte_level(&piece),
            Decoding::ByteFallback => match byte_piece(&piece) {
                Some(byte) => vec![byte],
                None => piece.replace('\u{2581}', " ").into_bytes(),
            },
            Decoding::Other => piece.replace('\u{2581}', " ").into_bytes(),
        }
    }

    /// One token as text by itself, as log-probability listings show it.
    pub fn show(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.bytes(id)).into_owned()
    }
}

fn build(bytes: &[u8]) -> Result<Inner, String> {
    let mut inner = Inner::from_bytes(bytes).map_err(|error| error.to_string())?;
    // Both would change lengths behind our back.
    inner.with_truncation(None).map_err(|error| error.to_string())?;
    inner.with_padding(None);
    Ok(inner)
}

/// The `tokenizers` crate numbers added tokens itself when the file's ids leave
/// a gap, which would silently change what the model reads.
fn check_added(json: &Value, inner: &Inner) -> Result<(), String> {
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(content), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
            continue;
        };
        let given = inner.token_to_id(content);
        if given.map(u64::from) != Some(id) {
            let content = content.escape_debug();
            let given = given.map_or_else(|| "none".to_owned(), |id| id.to_string());
            return Err(format!("added token `{content}` has id {id} but is numbered {given}"));
        }
    }
    Ok(())
}

/// Marks every control token special and then has special tokens read as text.
fn build_plain(mut json: Value) -> Result<Inner, String> {
    if let Some(added) = json["added_tokens"].as_array_mut() {
        for token in added {
            let control = token["content"].as_str().is_some_and(is_control);
            token["special"] = Value::Bool(control);
        }
    }
    let bytes = serde_json::to_vec(&json).map_err(|error| error.to_string())?;
    let mut plain = build(&bytes)?;
    plain.set_encode_special_tokens(true);
    Ok(plain)
}

/// Added tokens of white space only are spelling, not control.
fn is_control(content: &str) -> bool {
    !content.trim().is_empty()
}

fn encode(inner: &Inner, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizeError> {
    let encoding = inner
        .encode_fast(text, add_special)
        .map_err(|error| TokenizeError::Failed(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

fn flag(config: &Document, field: &'static str) -> Result<Option<bool>, LoadError> {
    match config.get(field) {
        None => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(_) => Err(config.refuse(field, "must be a boolean")),
    }
}

fn decoding(decoder: &Value) -> Decoding {
    let kinds: Vec<&str> = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|part| part["type"].as_str())
            .collect(),
        Some(kind) => vec![kind],
        None => Vec::new(),
    };
    if kinds == ["ByteLevel"] {
        Decoding::ByteLevel
    } else if kinds.contains(&"ByteFallback") {
        Decoding::ByteFallback
    } else {
        Decoding::Other
    }
}

/// The byte that a `<0x41>` token stands for.
pub(crate) fn byte_piece(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The bytes of a byte-level piece; a piece with a character outside GPT-2's
/// byte alphabet (an added token) stands for its own UTF-8.
fn byte_level(piece: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = piece.chars().map(alphabet_byte).collect();
    bytes.unwrap_or_else(|| piece.as_bytes().to_vec())
}

/// GPT-2 writes printable Latin-1 bytes as themselves and the other 68 as the
/// characters from U+0100 on, in byte order.
fn alphabet_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}
