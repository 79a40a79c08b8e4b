//! Keeps what a user writes from becoming control tokens. A control token's
//! spelling inside a message is broken by a mark, one private-use character
//! that occurs in no message; after rendering, marked text is tokenised apart
//! from the template's own control tokens, with none of its own.
//!
//! Messages without such a spelling pass untouched, so that the template sees
//! them as they are and the ids equal those of the reference tokenizer.

use std::borrow::Cow;
use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};
use rand::Rng as _;

use super::tokenizer::{Control, TokenizeError, Tokenizer};

/// Marks a reasoning model writes itself and templates look for in its earlier answers.
const REASONING: [&str; 2] = ["<think>", "</think>"];

/// Whose words a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Every control token's spelling is broken.
    Words,
    /// An earlier answer: reasoning marks are left, the rest is broken.
    Answer,
}

impl Trust {
    pub fn of_role(role: &str) -> Self {
        if role == "assistant" { Self::Answer } else { Self::Words }
    }
}

/// Finds control tokens in text.
pub struct Shield {
    controls: Vec<Control>,
    /// Every occurrence, for breaking.
    every: Option<AhoCorasick>,
    /// Leftmost longest, as the tokenizer matches.
    leftmost: Option<AhoCorasick>,
    normalizes: bool,
}

enum Piece {
    Control(u32),
    Text(String),
}

impl Shield {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let controls: Vec<Control> = tokenizer.controls().values().cloned().collect();
        let spellings = || controls.iter().map(|control| control.content.as_str());
        let finder = |kind| {
            // Fails only beyond 2^31 states, which the file's size limit rules out;
            // without a finder, `guard` marks every text.
            AhoCorasick::builder().match_kind(kind).build(spellings()).ok()
        };
        Self {
            every: finder(MatchKind::Standard),
            leftmost: finder(MatchKind::LeftmostLongest),
            normalizes: tokenizer.normalizes_controls(),
            controls,
        }
    }

    /// A character that none of `texts` holds, at random from private-use plane
    /// 16; none when the texts hold every character beyond plane 3.
    pub fn mark<'a>(texts: impl Iterator<Item = &'a str>) -> Option<char> {
        let used: HashSet<char> =
            texts.flat_map(str::chars).filter(|&c| c >= '\u{40000}').collect();
        let mut random = rand::rng();
        (0..64)
            .filter_map(|_| char::from_u32(random.random_range(0x10_0000..=0x10_FFFD)))
            .chain('\u{40000}'..=char::MAX)
            .find(|c| !used.contains(c))
    }

    /// `text` with the mark inside every spelling of a control token.
    pub fn guard<'a>(
        &self,
        tokenizer: &Tokenizer,
        text: &'a str,
        trust: Trust,
        mark: char,
    ) -> Cow<'a, str> {
        let mut cuts: Vec<usize> = match &self.every {
            Some(finder) => finder
                .find_overlapping_iter(text)
                .filter(|found| !self.passes(found.pattern().as_usize(), trust))
                .map(|found| cut_inside(text, found.start(), found.end()))
                .collect(),
            None => vec![0],
        };
        // A normalizer can turn other characters into a control token's
        // spelling, which only the tokenizer itself can tell.
        if cuts.is_empty() && self.normalizes && self.forged(tokenizer, text, trust) {
            cuts.push(0);
        }
        if cuts.is_empty() {
            return Cow::Borrowed(text);
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut guarded = String::with_capacity(text.len() + cuts.len() * mark.len_utf8());
        let mut done = 0;
        for cut in cuts {
            guarded.push_str(&text[done..cut]);
            guarded.push(mark);
            done = cut;
        }
        guarded.push_str(&text[done..]);
        Cow::Owned(guarded)
    }

    fn passes(&self, control: usize, trust: Trust) -> bool {
        trust == Trust::Answer && REASONING.contains(&self.controls[control].content.as_str())
    }

    fn forged(&self, tokenizer: &Tokenizer, text: &str, trust: Trust) -> bool {
        let Ok(ids) = tokenizer.encode(text, false) else { return true };
        ids.iter().any(|id| {
            tokenizer.controls().get(id).is_some_and(|control| {
                trust == Trust::Words || !REASONING.contains(&control.content.as_str())
            })
        })
    }

    /// Ids of rendered text that holds the mark.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        rendered: &str,
        mark: char,
    ) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        for piece in self.split(rendered, mark) {
            match piece {
                Piece::Control(id) => ids.push(id),
                Piece::Text(text) => encode_text(tokenizer, &text, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// The template's control tokens, and the text between them without marks.
    fn split(&self, rendered: &str, mark: char) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut done = 0;
        let mut strip_next = false;
        let text = |from: usize, to: usize, lstrip: bool, rstrip: bool| {
            let mut part: String = rendered[from..to].chars().filter(|&c| c != mark).collect();
            if rstrip {
                part = part.trim_start().to_owned();
            }
            if lstrip {
                part.truncate(part.trim_end().len());
            }
            (!part.is_empty()).then_some(Piece::Text(part))
        };
        for found in self.leftmost.iter().flat_map(|finder| finder.find_iter(rendered)) {
            if rendered[..found.start()].ends_with(mark) {
                continue;
            }
            let control = &self.controls[found.pattern().as_usize()];
            pieces.extend(text(done, found.start(), control.lstrip, strip_next));
            pieces.push(Piece::Control(control.id));
            strip_next = control.rstrip;
            done = found.end();
        }
        pieces.extend(text(done, rendered.len(), false, strip_next));
        pieces
    }
}

/// After the first character, or before it when there is only one.
fn cut_inside(text: &str, start: usize, end: usize) -> usize {
    let first = text[start..end].chars().next().map_or(0, char::len_utf8);
    if start + first < end { start + first } else { start }
}

/// Plain ids of `text`. A vocabulary may spell a control token among its
/// ordinary entries; such a piece is tokenised character by character.
fn encode_text(tokenizer: &Tokenizer, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
    for id in tokenizer.encode_plain(text)? {
        let Some(control) = tokenizer.controls().get(&id) else {
            ids.push(id);
            continue;
        };
        for c in control.content.chars() {
            let spelled = tokenizer.encode_plain(c.encode_utf8(&mut [0; 4]))?;
            ids.extend(spelled.into_iter().filter(|id| !tokenizer.controls().contains_key(id)));
        }
    }
    Ok(())
}
