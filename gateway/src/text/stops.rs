//! Stop strings in text that arrives in pieces. Text is held back only while
//! it may still become a stop string, so what is found does not depend on
//! where the pieces were cut.

/// Watches one sequence's text.
pub struct Stops {
    strings: Vec<String>,
    include: bool,
    held: String,
}

/// What [`Stops::push`] lets through.
#[derive(Debug, PartialEq, Eq)]
pub struct Passed {
    pub text: String,
    /// The stop string that ended the text.
    pub matched: Option<String>,
}

impl Stops {
    /// `include` keeps the stop string itself in the text.
    pub fn new(strings: Vec<String>, include: bool) -> Self {
        Self { strings, include, held: String::new() }
    }

    /// Takes more text; returns what can no longer become a stop string. The
    /// stop string that is complete first wins, the longest of several.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        let first = self
            .strings
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at, stop)))
            .min();
        if let Some((end, start, stop)) = first {
            let matched = Some(stop.clone());
            self.held.truncate(if self.include { end } else { start });
            return Passed { text: std::mem::take(&mut self.held), matched };
        }
        let keep = self.strings.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        Passed { text: std::mem::replace(&mut self.held, kept), matched: None }
    }

    /// What is still held when the sequence ends otherwise.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    (1..=most)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<String>) {
        let strings = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut stops = Stops::new(strings, include);
        let mut text = String::new();
        for piece in pieces {
            let passed = stops.push(piece);
            text.push_str(&passed.text);
            if passed.matched.is_some() {
                return (text, passed.matched);
            }
        }
        text.push_str(&stops.finish());
        (text, None)
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        for (stops, include, pieces, text, matched) in [
            (&["END"][..], false, &["a E", "N", "D b"][..], "a ", Some("END")),
            (&["END"], true, &["a E", "N", "D b"], "a END", Some("END")),
            (&["END"], false, &["a E", "N", "d"], "a ENd", None),
            (&["END"], false, &["a EN"], "a EN", None),
            (&["\n\n", "\n"], false, &["a\n", "\nb"], "a", Some("\n")),
            (&["bcd", "c"], false, &["abcd"], "ab", Some("c")),
            (&["héé"], false, &["h", "é", "é!"], "", Some("héé")),
            (&[], false, &["a", "b"], "ab", None),
        ] {
            let expected = (text.to_owned(), matched.map(str::to_owned));
            assert_eq!(run(stops, include, pieces), expected, "{stops:?} {pieces:?}");
        }
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held() {
        let mut stops = Stops::new(vec!["abab!".to_owned()], false);
        assert_eq!(stops.push("xaba").text, "x");
        assert_eq!(stops.push("bab").text, "ab");
        assert_eq!(stops.push("c").text, "ababc");
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_text(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..30, 0..6),
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut bounds: Vec<usize> = cuts.into_iter().map(|c| c.min(chars.len())).collect();
            bounds.extend([0, chars.len()]);
            bounds.sort_unstable();
            let pieces: Vec<String> =
                bounds.windows(2).map(|w| chars[w[0]..w[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let single: Vec<String> = chars.iter().map(char::to_string).collect();
            let single: Vec<&str> = single.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, false, &pieces), run(&stops, false, &single));
        }
    }
}
