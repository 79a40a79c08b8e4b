//! The terminal of a local mesh: every process's log lines with its name before
//! them, the mesh's own messages, and room for progress bars that the lines must
//! not tear. Standard output stays free for what the user asked for.

use std::collections::VecDeque;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;

use indicatif::{MultiProgress, ProgressDrawTarget};
use mesh::telemetry::LogFormat;
use parking_lot::Mutex;

/// Lines kept back while standard output has the terminal, or in a quiet mesh.
const MOST_KEPT: usize = 500;
/// Width of the longest usual name, `expert-node-0`.
const NAME_WIDTH: usize = 13;
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 96];

/// What is done with log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Show,
    /// Kept for later, the newest only.
    Keep,
}

/// A cheap handle to the one terminal.
#[derive(Clone)]
pub struct Console(Arc<Inner>);

struct Inner {
    format: LogFormat,
    /// Only warnings are of interest, and only if something goes wrong.
    quiet: bool,
    terminal: bool,
    colour: bool,
    bars: MultiProgress,
    lines: Mutex<Lines>,
}

struct Lines {
    mode: Mode,
    kept: VecDeque<String>,
}

impl Console {
    /// One that shows everything as it comes.
    pub fn new(format: LogFormat) -> Self {
        Self::build(format, false)
    }

    /// One that keeps warnings until [`Console::set_mode`] asks for them.
    pub fn quiet(format: LogFormat) -> Self {
        Self::build(format, true)
    }

    fn build(format: LogFormat, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let unset = |variable| std::env::var_os(variable).is_none_or(|value| value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let target = if terminal && !quiet && format == LogFormat::Text {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self(Arc::new(Inner {
            format,
            quiet,
            terminal,
            colour: terminal && !dumb && unset("NO_COLOR"),
            bars: MultiProgress::with_draw_target(target),
            lines: Mutex::new(Lines {
                mode: if quiet { Mode::Keep } else { Mode::Show },
                kept: VecDeque::new(),
            }),
        }))
    }

    /// Whether progress bars are drawn.
    pub fn has_bars(&self) -> bool {
        self.0.terminal && !self.0.quiet && self.0.format == LogFormat::Text
    }

    pub fn bars(&self) -> &MultiProgress {
        &self.0.bars
    }

    /// One line that a process wrote. `place` picks its colour.
    pub fn log(&self, name: &str, place: usize, line: &str) {
        let text = self.format(name, place, line);
        let mut lines = self.0.lines.lock();
        match lines.mode {
            Mode::Show => self.write(&text),
            Mode::Keep => {
                if lines.kept.len() == MOST_KEPT {
                    lines.kept.pop_front();
                }
                lines.kept.push_back(text);
            }
        }
    }

    /// One line of the mesh's own on how things go.
    pub fn say(&self, line: &str) {
        if !self.0.quiet {
            self.warn(line);
        }
    }

    /// One line of the mesh's own on what went wrong.
    pub fn warn(&self, line: &str) {
        self.log("up", COLOURS.len() - 1, line);
    }

    /// One line of the mesh's own that is shown whatever else is kept back.
    pub fn notice(&self, line: &str) {
        self.write(&self.format("up", COLOURS.len() - 1, line));
    }

    /// Keeps log lines back, or shows what was kept and all that follows.
    pub fn set_mode(&self, mode: Mode) {
        let mut lines = self.0.lines.lock();
        lines.mode = mode;
        if mode == Mode::Show {
            for line in std::mem::take(&mut lines.kept) {
                self.write(&line);
            }
        }
    }

    fn format(&self, name: &str, place: usize, line: &str) -> String {
        match self.0.format {
            LogFormat::Json => named_json(name, line),
            LogFormat::Text => self.prefixed(name, COLOURS[place % COLOURS.len()], line),
        }
    }

    fn prefixed(&self, name: &str, colour: u8, line: &str) -> String {
        if self.0.colour {
            format!("\x1b[{colour}m{name:<NAME_WIDTH$} │\x1b[0m {line}")
        } else {
            format!("{name:<NAME_WIDTH$} │ {line}")
        }
    }

    fn write(&self, text: &str) {
        self.0.bars.suspend(|| {
            // A terminal that is gone is no reason to stop serving.
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }
}

/// A line of JSON with the name of the process that wrote it.
fn named_json(name: &str, line: &str) -> String {
    let name = serde_json::Value::from(name);
    match line.strip_prefix('{').filter(|rest| rest.ends_with('}') && rest.len() > 1) {
        Some(rest) => format!("{{\"process\":{name},{rest}"),
        None => serde_json::json!({ "process": name, "fields": { "message": line } }).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_stays_one() {
        for (line, want) in [
            (r#"{"level":"INFO"}"#, r#"{"process":"router-0","level":"INFO"}"#),
            ("a \"b\"", r#"{"fields":{"message":"a \"b\""},"process":"router-0"}"#),
            ("{}", r#"{"fields":{"message":"{}"},"process":"router-0"}"#),
        ] {
            let named = named_json("router-0", line);
            assert_eq!(named, want);
            assert!(serde_json::from_str::<serde_json::Value>(&named).is_ok());
        }
    }

    #[test]
    fn a_quiet_console_keeps_the_newest_lines() {
        let console = Console::quiet(LogFormat::Text);
        console.say("as planned");
        for number in 0..MOST_KEPT + 3 {
            console.log("router-0", 0, &number.to_string());
        }
        let lines = console.0.lines.lock();
        assert_eq!(lines.kept.len(), MOST_KEPT);
        assert!(lines.kept[0].ends_with(" 3"), "{}", lines.kept[0]);
    }
}
