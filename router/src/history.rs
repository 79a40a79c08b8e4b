//! An event log for those who check a run afterwards (`tests/chaos`): which
//! frame carried which slots under which epoch, which reply was taken, who took
//! part in a step and who had left, who was in office and what it ordered. JSON
//! lines, one writer, in the order of things. Off unless the key `history` names
//! a file, and then it costs nothing but a branch: what is to be written is not
//! even formatted.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh::placement::{NodeIndex, Placement};
use parking_lot::Mutex;
use proto::v1::NodeDescription;

/// Clones write to the same file.
#[derive(Clone, Default)]
pub struct History(Option<Arc<Mutex<BufWriter<File>>>>);

impl History {
    /// Appends to the file at `path`, which may hold an earlier life of the router.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn open(path: Option<&Path>, router: &str) -> std::io::Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let history = Self(Some(Arc::new(Mutex::new(BufWriter::new(file)))));
        // A life that was cut short may have left half a line.
        history.write(format_args!("\n"));
        history.record("start", format_args!("\"router\":{router:?}"));
        Ok(history)
    }

    /// Whether anybody reads it.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// One event: its kind and its fields, as they stand inside a JSON object.
    pub fn record(&self, event: &str, fields: fmt::Arguments<'_>) {
        if self.0.is_some() {
            self.write(format_args!("{{\"t\":{},\"e\":\"{event}\",{fields}}}\n", now()));
        }
    }

    /// A placement as it is published, with what the live nodes hold.
    pub fn placement(&self, next: &Placement, live: &[(NodeIndex, Arc<NodeDescription>)]) {
        if self.0.is_none() {
            return;
        }
        let mut cells = String::new();
        for (layer, expert, owners) in next.cells() {
            let comma = if cells.is_empty() { "" } else { "," };
            let owners = list(owners.iter().map(|node| node.0));
            // Writing to a string cannot fail.
            let _ = write!(cells, "{comma}[{layer},{expert},{owners}]");
        }
        let held = list(live.iter().map(|(node, about)| {
            let layers = about
                .owned
                .iter()
                .map(|owned| format!("[{},{}]", owned.layer, list(owned.experts.iter())));
            format!("[{},{}]", node.0, list(layers))
        }));
        let epoch = next.epoch().0;
        self.record(
            "placement",
            format_args!("\"epoch\":{epoch},\"owners\":[{cells}],\"held\":{held}"),
        );
        self.flush();
    }

    /// Hands what was recorded to the system, so that a kill does not lose it.
    pub fn flush(&self) {
        if let Some(file) = &self.0 {
            // A full disk must not stop the router; the checker sees what is missing.
            let _ = file.lock().flush();
        }
    }

    fn write(&self, line: fmt::Arguments<'_>) {
        if let Some(file) = &self.0 {
            let _ = file.lock().write_fmt(line);
        }
    }
}

/// Microseconds since 1970, by which the logs of several routers of one machine compare.
pub fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()
}

/// A JSON array of things that write themselves as JSON.
pub fn list(items: impl Iterator<Item = impl fmt::Display>) -> String {
    let mut text = String::from("[");
    for (at, item) in items.enumerate() {
        let _ = write!(text, "{}{item}", if at == 0 { "" } else { "," });
    }
    text + "]"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines_and_a_second_life_goes_on_in_the_same_file() {
        let path = std::env::temp_dir().join(format!("history-{}", std::process::id()));
        History::open(None, "r").unwrap().record("lost", format_args!("\"n\":1"));
        for life in 0..2 {
            let history = History::open(Some(&path), "r").unwrap();
            history.record("step", format_args!("\"n\":{life},\"seqs\":{}", list([3, 4].iter())));
            history.flush();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[1].ends_with("\"e\":\"step\",\"n\":0,\"seqs\":[3,4]}"), "{text}");
        assert!(lines[2].contains("\"e\":\"start\",\"router\":\"r\""), "{text}");
    }
}
